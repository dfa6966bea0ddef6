"""However a run is carried out, its assembled model has the same bytes: the property everything else leans on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dbtrain.assembly.assemble import assemble
from dbtrain.config import RunConfig
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.run import BackendName, RunResult, train_run
from dbtrain.orchestration.state import BlockState
from dbtrain.orchestration.stopping import StopToken
from dbtrain.run_directory import RunDirectory

pytestmark = pytest.mark.timeout(240)  # two files of tests run at a time, and this one trains on a cluster

STEPS = 300


@pytest.fixture(scope="module")
def config(small_config: Callable[..., RunConfig]) -> RunConfig:
    return small_config(training={"steps": STEPS}, checkpoints={"every": 40}, resources={"cpus": 0.25, "threads": 1})


@pytest.fixture(scope="module")
def expected(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the plain case: this process, block after block."""
    return _digest(train_run(config, tmp_path_factory.mktemp("inline") / "run", backend="inline"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One private Ray cluster for all cases here; `train_run` uses the connection it finds."""
    from dbtrain.orchestration.ray_cluster import connect

    connection = connect()
    yield
    connection.close()


@pytest.fixture(
    params=["dit", "causal_lm", pytest.param("recurrent_lm", marks=pytest.mark.slow), "masked_lm"], scope="module"
)
def other(request: pytest.FixtureRequest, family_config: Callable[..., RunConfig]) -> RunConfig:
    """A run of each of the other families."""
    return family_config(request.param, training={"steps": 120}, checkpoints={"every": 40})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def _digest(result: RunResult) -> str:
    assert [block.state for block in result.blocks] == [BlockState.FINISHED] * 3, result
    return assemble(RunDirectory.open(result.run)).sha256


class Killer:
    """Kills the worker of `block` with SIGKILL at each of the given steps, each time another process."""

    def __init__(self, block: int, steps: tuple[int, ...]):
        self._block = block
        self._steps = list(steps)
        self.killed: list[int] = []

    def update(self, snapshot: Snapshot) -> None:
        status = snapshot.blocks[self._block]
        if self._steps and status.state is BlockState.RUNNING and self._steps[0] <= status.step < STEPS:
            assert status.pid is not None
            if status.pid in self.killed:
                return
            os.kill(status.pid, signal.SIGKILL)
            self.killed.append(status.pid)
            self._steps.pop(0)


class Stopper:
    """Asks the run to stop as soon as some block has done `step` steps."""

    def __init__(self, token: StopToken, step: int):
        self._token = token
        self._step = step

    def update(self, snapshot: Snapshot) -> None:
        if any(self._step <= block.step < STEPS for block in snapshot.blocks):
            self._token.request()


def test_inline_in_reversed_order(config: RunConfig, expected: str, run: Path) -> None:
    assert _digest(train_run(config, run, backend="inline", order=[2, 1, 0])) == expected


def test_another_seed_gives_another_digest(config: RunConfig, tmp_path: Path) -> None:
    short = config.model_copy(update={"training": config.training.model_copy(update={"steps": 20})})
    other = short.model_copy(update={"seed": config.seed + 1})
    digests = [_digest(train_run(c, tmp_path / str(c.seed), backend="inline")) for c in (short, other)]
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_ray_all_blocks_at_once(config: RunConfig, expected: str, run: Path, cluster: None) -> None:
    result = train_run(config, run, backend="ray")
    assert RunDirectory.open(run).events()[0]["slots"] == 3
    assert _digest(result) == expected


def test_ray_with_one_slot(config: RunConfig, expected: str, run: Path, cluster: None) -> None:
    queued = config.model_copy(update={"resources": config.resources.model_copy(update={"workers": 1})})
    result = train_run(queued, run, backend="ray")
    assert RunDirectory.open(run).events()[0]["slots"] == 1
    assert _digest(result) == expected


def test_ray_with_a_worker_killed_twice(config: RunConfig, expected: str, run: Path, cluster: None) -> None:
    killer = Killer(block=1, steps=(20, 60))
    result = train_run(config, run, backend="ray", watch=killer)
    assert len(killer.killed) == 2
    assert [block.restarts for block in result.blocks] == [0, 2, 0]
    assert _digest(result) == expected


@pytest.mark.parametrize("backend", ["inline", "ray"])
def test_stopped_and_started_again(
    config: RunConfig, expected: str, run: Path, cluster: None, backend: BackendName
) -> None:
    token = StopToken()
    first = train_run(config, run, backend=backend, watch=Stopper(token, 20), stop=token)
    assert first.stopped
    assert not first.ok
    assert _digest(train_run(config, run, backend=backend)) == expected


def test_every_family_on_ray(other: RunConfig, tmp_path: Path, cluster: None) -> None:
    shorter = other.model_copy(update={"training": other.training.model_copy(update={"steps": 30})})
    inline = _digest(train_run(shorter, tmp_path / "inline", backend="inline"))
    assert _digest(train_run(shorter, tmp_path / "ray", backend="ray")) == inline


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
def test_every_family_with_a_worker_killed_twice(other: RunConfig, tmp_path: Path, cluster: None) -> None:
    longer = other.model_copy(update={"training": other.training.model_copy(update={"steps": STEPS})})
    killer = Killer(block=1, steps=(20, 60))
    result = train_run(longer, tmp_path / "ray", backend="ray", watch=killer)
    assert len(killer.killed) == 2
    assert [block.restarts for block in result.blocks] == [0, 2, 0]
    assert _digest(result) == _digest(train_run(longer, tmp_path / "inline", backend="inline"))
