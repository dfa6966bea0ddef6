"""Runs on a private Ray cluster of this machine, which all tests of this module share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from run_journal import events

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.ray_cluster import Cluster, connect
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.state import LIVE, BlockState, BlockStatus
from dbtrain.orchestration.stopping import StopToken
from dbtrain.run_directory import RunDirectory

MakeConfig = Callable[..., RunConfig]
DigestOf = Callable[[Path], str]
LONG = {"steps": 500, "batch_size": 16}  # long enough to be interrupted


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    here = connect()
    yield here
    here.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig, digest_of: DigestOf) -> str:
    """The digest of the long run, trained in this process."""
    path = tmp_path_factory.mktemp("undisturbed")
    assert train_run(make_config(training=LONG), path, backend="inline").ok
    return digest_of(path)


class Watch:
    """Calls `look` with every snapshot."""

    def __init__(self, look: Callable[[Snapshot], None]):
        self.look = look

    def update(self, snapshot: Snapshot) -> None:
        self.look(snapshot)


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_worker_killed_in_training_resumes_and_nobody_else_notices(
    cluster: Cluster,
    tmp_path: Path,
    make_config: MakeConfig,
    digest_of: DigestOf,
    undisturbed: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    killed: list[BlockStatus] = []
    commands: set[str] = set()

    def look(snapshot: Snapshot) -> None:
        block = snapshot.blocks[1]
        if block.pid is not None and block.checkpoint_step > 0 and not killed:
            commands.add(command(block.pid))
            os.kill(block.pid, signal.SIGKILL)
            killed.append(block)

    result = train_run(make_config(training=LONG), tmp_path, backend="ray", watch=Watch(look))
    assert result.ok
    assert [block.restarts for block in result.blocks] == [0, 1, 0]
    assert all(text.startswith("ray::BlockWorker") for text in commands)
    restarting = events(tmp_path, "block_restarting")
    assert [line["block"] for line in restarting] == [1]
    assert "the worker's process died" in restarting[0]["reason"]
    steps = [line["step"] for line in RunDirectory.open(tmp_path).block(1).metrics() if line["attempt"] == 2]
    assert steps[0] > 10  # from its checkpoint, not from the start
    assert digest_of(tmp_path) == undisturbed
    assert capfd.readouterr().out == ""


def test_more_blocks_than_slots_are_a_queue_and_each_worker_says_who_it_is(
    cluster: Cluster, tmp_path: Path, make_config: MakeConfig
) -> None:
    most = 0

    def look(snapshot: Snapshot) -> None:
        nonlocal most
        most = max(most, sum(block.state in LIVE for block in snapshot.blocks))

    config = make_config(resources={"workers": 1})
    assert train_run(config, tmp_path, backend="ray", order=[2, 1, 0], watch=Watch(look)).ok
    assert most == 1
    assert [line["block"] for line in events(tmp_path, "block_starting")] == [2, 1, 0]
    assert cluster.log_folder is not None
    for line in events(tmp_path, "block_running"):
        block, pid = line["block"], line["pid"]
        logs = [file.read_text() for file in Path(cluster.log_folder).glob(f"worker-*-{pid}.out")]
        assert any(f"dbtrain run {tmp_path} block {block} attempt 1 process {pid}\n" in log for log in logs)


@pytest.mark.parametrize(("name", "amount"), [("gpus", 64), ("cpus", 4096)])
def test_what_no_node_has_is_refused_and_leaves_nothing_behind(
    cluster: Cluster, tmp_path: Path, make_config: MakeConfig, name: str, amount: int
) -> None:
    with pytest.raises(UserError, match=f"asks for {amount} {name.upper()[:3]}") as caught:
        train_run(make_config(resources={name: amount, "device": "cpu"}), tmp_path / "run", backend="ray")
    assert caught.value.field == f"resources.{name}"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_stop_and_start_again_give_the_same_bytes(
    cluster: Cluster, tmp_path: Path, make_config: MakeConfig, digest_of: DigestOf, undisturbed: str
) -> None:
    stop = StopToken()

    def look(snapshot: Snapshot) -> None:
        if snapshot.blocks[0].step >= 20:
            stop.request()

    config = make_config(training=LONG)
    result = train_run(config, tmp_path, backend="ray", stop=stop, watch=Watch(look))
    assert result.stopped
    assert result.blocks[0].state is BlockState.STOPPED
    # A stop saves the step it came at, wherever the cadence of checkpoints stands.
    assert RunDirectory.open(tmp_path).block(0).checkpoints.list()[-1] == f"step-{result.blocks[0].step:08d}"
    assert train_run(config, tmp_path, backend="ray").ok
    assert digest_of(tmp_path) == undisturbed


def test_an_error_in_a_worker_fails_its_block_with_the_reason_and_the_others_go_on(
    cluster: Cluster, tmp_path: Path, make_config: MakeConfig
) -> None:
    assert train_run(make_config(), tmp_path, backend="inline").ok
    for file in (tmp_path / "blocks/01/checkpoints").glob("step-*/model.safetensors*"):
        file.write_bytes(b"not a checkpoint")
    for folder in (tmp_path / "blocks/02/checkpoints").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    result = train_run(make_config(), tmp_path, backend="ray")
    assert [block.state.value for block in result.blocks] == ["finished", "failed", "finished"]
    assert result.blocks[1].restarts == 1
    assert "all checkpoints of block 1 are damaged" in str(result.blocks[1].reason)
    assert "CorruptData" in events(tmp_path, "block_failed")[0]["traceback"]


@pytest.mark.slow
def test_a_hung_worker_holds_nobody_up(cluster: Cluster, tmp_path: Path, make_config: MakeConfig) -> None:
    frozen: list[int] = []

    def look(snapshot: Snapshot) -> None:
        first, *others = snapshot.blocks
        if first.pid is not None and first.step > 0 and not frozen:
            os.kill(first.pid, signal.SIGSTOP)
            frozen.append(first.pid)
        if frozen and all(block.state is BlockState.FINISHED for block in others) and first.pid is not None:
            os.kill(first.pid, signal.SIGCONT)

    # Patient enough not to take it for dead before the others are done.
    config = make_config(training=LONG, resources={"heartbeat_timeout": 600.0})
    result = train_run(config, tmp_path, backend="ray", watch=Watch(look))
    assert result.ok
    assert [block.restarts for block in result.blocks] == [0, 0, 0]
    assert events(tmp_path, "block_finished")[-1]["block"] == 0


def test_a_worker_that_hangs_is_killed_and_its_block_goes_on(
    cluster: Cluster, tmp_path: Path, make_config: MakeConfig, digest_of: DigestOf, undisturbed: str
) -> None:
    frozen: list[int] = []

    def look(snapshot: Snapshot) -> None:
        block = snapshot.blocks[1]
        if block.pid is not None and block.checkpoint_step > 0 and not frozen:
            os.kill(block.pid, signal.SIGSTOP)
            frozen.append(block.pid)

    # Patient enough not to take a worker on busy cores for one that hangs.
    config = make_config(training=LONG, resources={"heartbeat_timeout": 10.0})
    result = train_run(config, tmp_path, backend="ray", watch=Watch(look))
    assert result.ok
    assert [block.restarts for block in result.blocks] == [0, 1, 0]
    assert events(tmp_path, "block_restarting")[0]["reason"] == "the worker hangs: no answer for 10 s"
    assert digest_of(tmp_path) == undisturbed


def test_a_worker_that_finds_no_room_in_time_counts_as_dead(
    cluster: Cluster, tmp_path: Path, make_config: MakeConfig
) -> None:
    @ray.remote
    class Squatter:
        def here(self) -> bool:
            return True

    total = ray.cluster_resources()["CPU"]
    squatter = Squatter.options(num_cpus=total).remote()
    assert ray.get(squatter.here.remote())
    resources = {"cpus": total, "start_timeout": 1.0, "max_restarts": 0}
    try:
        result = train_run(make_config(resources=resources), tmp_path, backend="ray")
    finally:
        ray.kill(squatter)
    assert {block.reason for block in result.blocks} == {
        "the worker did not start within 1 s (after 0 restarts without a new checkpoint)"
    }
    assert {block.state for block in result.blocks} == {BlockState.FAILED}
