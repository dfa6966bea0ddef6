"""Several workers of one block, as real processes that talk over gloo: the same training as by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import start_run, train_block
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.plan import Kind
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import read_weights
from dbtrain.training.meeting import MeetingPlace

FamilyConfig = Callable[..., RunConfig]

pytestmark = pytest.mark.timeout(300)


class Replica:
    """A process of `replica_process.py`."""

    def __init__(self, run: RunDirectory, attempt: int, seat: dict[str, Any], stop_at: int, log: Path):
        arguments = {"run": run.uri, "attempt": attempt, "seat": seat, "stop_at": stop_at}
        command = [sys.executable, str(Path(__file__).with_name("replica_process.py")), json.dumps(arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def next(self) -> dict[str, Any]:
        """The next line it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()[-3000:]
        told: dict[str, Any] = json.loads(line)
        return told

    def outcome(self) -> dict[str, Any]:
        """Its last line."""
        told = self.next()
        while "kind" not in told:
            told = self.next()
        return told


Start = Callable[..., list[Replica]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the replicas of block 0 and ends what is left of them after the test."""
    started: list[Replica] = []
    meeting = MeetingPlace("127.0.0.1")

    def start_replicas(
        run: RunDirectory, attempt: int = 1, replicas: int = 2, until: int | None = None, stop_at: int = -1
    ) -> list[Replica]:
        """`stop_at` is the report at which the last replica alone is asked to stop."""
        group = []
        for number in range(replicas):
            seat = {"replica": number, "replicas": replicas, "meeting": meeting.address, "until": until}
            last = number == replicas - 1
            log = tmp_path / f"log-{len(started)}"
            group.append(Replica(run, attempt, seat, stop_at if last else -1, log))
            started.append(group[-1])
        return group

    yield start_replicas
    for replica in started:
        replica.process.kill()
        replica.process.communicate()


def _config(family_config: FamilyConfig, family: str, **sections: dict[str, Any]) -> RunConfig:
    """Without dropout, which differs by replica."""
    merged: dict[str, Any] = {
        "model": {"dropout": 0.0} if family == "vit" else {},
        "training": {"steps": 12},
        "checkpoints": {"every": 4},
        "logging": {"every": 1},
    }
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    return family_config(family, **merged)


def _finish(group: list[Replica]) -> None:
    assert [(told["kind"], told["reason"]) for told in (replica.outcome() for replica in group)] == [
        ("finished", "") for _ in group
    ]


def _losses(run: RunDirectory) -> list[float]:
    lines = run.block(0).metrics()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def _tensors(run: RunDirectory) -> dict[str, Tensor]:
    block = run.block(0)
    return {
        f"{which}/{name}": value for which in ("raw", "ema") for name, value in read_weights(block, which)[1].items()
    }  # type: ignore[arg-type]


def _assert_same_training(one: RunDirectory, several: RunDirectory) -> None:
    assert _losses(several) == pytest.approx(_losses(one), rel=1e-4)
    expected, found = _tensors(one), _tensors(several)
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in expected.items()}
    for name, value in found.items():
        # Adam divides by the gradient's own size: where that is rounding, so is the update.
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("family", "shard", "sections", "kind"),
    [
        ("vit", False, {"training": {"accumulate": 2}, "data": {"augment": {"crop_padding": 1}}}, "blocks"),
        ("vit", True, {"training": {"accumulate": 2}, "data": {"augment": {"crop_padding": 1}}}, "blocks"),
        ("causal_lm", False, {}, "blocks"),
        ("causal_lm", True, {"training": {"recompute": True}}, "blocks"),
        ("masked_lm", False, {}, "blocks"),
        ("masked_lm", True, {}, "blocks"),
        pytest.param("dit", False, {}, "blocks", marks=pytest.mark.slow),
        pytest.param("dit", True, {"training": {"recompute": True}}, "blocks", marks=pytest.mark.slow),
        pytest.param("recurrent_lm", False, {}, "blocks", marks=pytest.mark.slow),
        pytest.param("recurrent_lm", True, {}, "blocks", marks=pytest.mark.slow),
        pytest.param("recurrent_lm", True, {}, "end_to_end", marks=pytest.mark.slow),
    ],
)
def test_the_same_loss_curve(
    family_config: FamilyConfig,
    tmp_path: Path,
    start: Start,
    family: str,
    shard: bool,
    sections: dict[str, Any],
    kind: Kind,
) -> None:
    one = start_run(_config(family_config, family, **sections), tmp_path / "one", kind)
    train_block(one)
    resources = {"replicas": 2, "shard": shard}
    two = start_run(_config(family_config, family, **sections, resources=resources), tmp_path / "two", kind)
    _finish(start(two))
    _assert_same_training(one, two)
