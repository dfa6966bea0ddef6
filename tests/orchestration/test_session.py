"""What a worker says of an attempt that went wrong: its reason, and the rows of the step that raised."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import start_run, train_block
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.data.order import SampleOrder
from dbtrain.errors import NoRoom
from dbtrain.orchestration.session import BlockSession, Outcome
from dbtrain.plan import human_bytes
from dbtrain.run_directory import BlockDirectory, RunDirectory
from dbtrain.training.seat import Seat
from dbtrain.training.trainer import BlockTrainer

MakeConfig = Callable[..., RunConfig]


def _end_of(session: BlockSession) -> Outcome:
    while not isinstance(report := session.advance(), Outcome):
        pass
    return report


def test_a_step_that_raises_names_its_rows(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(make_config(), tmp_path)
    backward = BlockTrainer._backward

    def raising(trainer: BlockTrainer, *arguments: Any) -> Tensor:
        if trainer.step == 7:
            raise ValueError("this batch is not to my taste")
        return backward(trainer, *arguments)

    monkeypatch.setattr(BlockTrainer, "_backward", raising)
    end = _end_of(BlockSession(run.uri, 1, 1))
    assert (end.kind, end.step, end.reason) == ("error", 7, "ValueError: this batch is not to my taste")
    assert run.plan.data is not None
    order = SampleOrder(run.plan.data.train_rows, run.config.seed, 1)
    assert end.rows == tuple(order.rows_at(7, run.plan.batch_size)[1].tolist())
    assert len(set(end.rows)) == run.plan.batch_size


def test_an_error_outside_a_step_has_no_rows(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(make_config(), tmp_path)

    def raising(trainer: BlockTrainer) -> None:
        raise ValueError("no saving today")

    monkeypatch.setattr(BlockTrainer, "_save", raising)
    end = _end_of(BlockSession(run.uri, 0, 1))
    assert (end.step, end.rows) == (10, ())
    end = _end_of(BlockSession(str(tmp_path / "nothing"), 0, 1))
    assert (end.step, end.rows) == (-1, ())


def test_a_worker_that_waits_to_begin_says_for_what(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is silent about it would be taken to hang."""
    run = start_run(make_config(), tmp_path)
    train_block(run)
    full, claim = threading.Event(), BlockDirectory.claim
    full.set()

    def refuse(block: BlockDirectory, attempt: int) -> None:
        if full.is_set():
            raise NoRoom("cannot write attempt.json: No space left on device")
        claim(block, attempt)

    monkeypatch.setattr(BlockDirectory, "claim", refuse)
    session = BlockSession(run.uri, 0, 2)
    assert session.progress() is None
    ends: list[Outcome] = []
    worker = threading.Thread(target=lambda: ends.append(_end_of(session)))
    worker.start()
    while (progress := session.progress()) is None:
        worker.join(0.02)
        assert worker.is_alive()
    assert (progress.step, progress.checkpoint_step, progress.total, progress.done) == (30, 30, 30, False)
    assert str(progress.trouble).startswith("cannot write attempt.json: No space left on device; waiting for room")
    full.clear()
    worker.join(60)
    assert [end.kind for end in ends] == ["finished"]


_STARVED = """
import dataclasses, json, re, resource, sys
from pathlib import Path
from dbtrain.orchestration.session import BlockSession, Outcome

session = BlockSession(sys.argv[1], 1, 1)
session.advance()  # built
used = int(re.search(r"VmSize:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), -1))
while not isinstance(report := session.advance(), Outcome):
    pass
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(json.dumps(dataclasses.asdict(report)))
"""


def _starved(run: RunDirectory, spare: int) -> dict[str, Any]:
    """How an attempt ends when its process may take no more than `spare` further bytes of memory."""
    command = [sys.executable, "-c", _STARVED, run.uri, str(spare)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(240)
def test_out_of_memory_says_what_to_do(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(model={"width": 256, "mlp_width": 1024}, training={"steps": 3, "batch_size": 8192})
    run = start_run(config, tmp_path)
    end = _starved(run, 48 << 20)
    assert (end["kind"], end["step"], len(end["rows"])) == ("error", 0, 8192)
    need = run.plan.blocks[1].bytes
    assert need.activations > 48 << 20
    assert end["reason"].startswith("block 1 ran out of memory: by the plan it needs ")
    assert f"needs {human_bytes(need.total)} beside the program itself" in end["reason"]
    half = human_bytes(need.activations // 2)
    assert f"training.accumulate=2, which makes the activations {half}" in end["reason"]
    assert "training.recompute=true" in end["reason"]
    assert "blocks.count" not in end["reason"]  # each block has a single layer
    assert "larger device" in end["reason"]
    assert "llocate memory" in end["traceback"] or "MemoryError" in end["traceback"]


def test_an_attempt_tells_where_and_from_which_step_it_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    run = start_run(make_config(training={"steps": 4}, checkpoints={"every": 2}), tmp_path)
    first = BlockSession(run.uri, 1, 1, Seat(until=2))
    assert _end_of(first).kind == "stopped"
    assert _end_of(BlockSession(run.uri, 1, 2)).kind == "finished"
    lines = [json.loads(line) for line in run.block(1).storage.read_text("workers.jsonl").splitlines()]
    assert [(line["attempt"], line["step"], line["replicas"]) for line in lines] == [(1, 0, 1), (2, 2, 1)]
    assert lines[0]["machine"] == platform.node()
    assert not run.block(0).storage.exists("workers.jsonl")


def test_an_attempt_trains_though_it_cannot_tell(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: BlockDirectory, facts: object) -> None:
        raise NoRoom("cannot write workers.jsonl: No space left on device")

    monkeypatch.setattr(BlockDirectory, "log_worker", full)
    run = start_run(make_config(training={"steps": 2}), tmp_path)
    assert _end_of(BlockSession(run.uri, 0, 1)).kind == "finished"
