from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.monitoring.run_view import RECENT, RunReader, RunState
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.lock import driver_lock
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.state import BlockState
from dbtrain.orchestration.stopping import StopToken
from dbtrain.run_directory import RunDirectory

SmallConfig = Callable[..., RunConfig]


@pytest.fixture
def run(small_config: SmallConfig, tmp_path: Path) -> RunDirectory:
    return start_run(small_config(training={"steps": 100}), tmp_path / "run")


def _metrics(step: int, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    line = {"step": step, "loss": loss, "grad_norm": 0.5, "lr": 1e-3, "samples_per_second": 50.0, "checkpoint_step": 0}
    return line | {"attempt": 1} | more


def test_a_whole_run_stopped_and_gone_on_with(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config(training={"steps": 8}, logging={"every": 1}, checkpoints={"every": 2})
    stop = StopToken()

    class StopAt:
        def update(self, snapshot: Snapshot) -> None:
            if snapshot.blocks[1].step >= 3:
                stop.request()

    train_run(config, tmp_path / "run", watch=StopAt(), stop=stop)
    reader = RunReader(RunDirectory.open(tmp_path / "run"))
    view = reader.read()
    assert view.state is RunState.STOPPED
    assert [block.state.value for block in view.blocks] == ["finished", "stopped", "stopped"]
    assert view.blocks[0].step == view.blocks[0].checkpoint_step == 8
    assert view.blocks[0].losses.steps == list(range(1, 9))
    assert view.blocks[0].peak_memory is not None
    assert view.blocks[0].peak_memory > 50e6  # PyTorch alone takes more
    assert view.seconds_left(view.blocks[0]) == 0
    assert view.ended_at is not None

    assert train_run(config, tmp_path / "run").ok
    view = reader.read()
    assert view.state is RunState.FINISHED
    assert view.starts == 2
    assert [block.step for block in view.blocks] == [8, 8, 8]
    assert view.blocks[1].losses.steps == list(range(1, 9))
    assert [block.restarts for block in view.blocks] == [0, 0, 0]  # a stop is no trouble


def test_a_driver_that_died_did_not_say_so(run: RunDirectory) -> None:
    reader = RunReader(run)
    assert reader.read().state is RunState.NEW
    with driver_lock(run.storage):
        run.journal({"event": "run_started", "backend": "ray", "slots": 3, "pid": 7, "node": "a", "nodes": {"n": 3}})
        run.journal({"event": "block_starting", "block": 0, "attempt": 1, "step": 0, "restarts": 0, "replicas": 2})
        here = {"pid": 8, "node": "b", "node_id": "n", "device": "cpu"}
        run.journal({"event": "block_running", "block": 0, "attempt": 1, "step": 0, **here})
        run.block(0).log_metrics(_metrics(10))
        view = reader.read()
        assert view.state is RunState.RUNNING
        block = view.blocks[0]
        assert (block.state, block.replicas, block.node, block.pid) == (BlockState.RUNNING, 2, "b", 8)
        assert view.seconds_left(block) == (100 - 10) * view.batch_size / 50
        assert block.flops_per_second == 50 * run.plan.blocks[0].flops_per_sample
    view = reader.read()
    assert view.state is RunState.INTERRUPTED
    assert view.blocks[0].state is BlockState.STOPPED
    assert view.seconds_left(view.blocks[0]) == math.inf


def test_who_may_only_read_a_run_sees_that_its_driver_is_gone(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with driver_lock(run.storage):
        run.journal({"event": "run_started", "backend": "ray", "slots": 3, "pid": 7, "node": "a"})
    may_open = os.open

    def open_to_read(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(path)
        return may_open(path, flags, mode)

    monkeypatch.setattr(os, "open", open_to_read)
    assert RunReader(run).read().state is RunState.INTERRUPTED


def test_a_restart_marks_the_curve_and_repeats_steps(run: RunDirectory) -> None:
    reader = RunReader(run)
    with driver_lock(run.storage):
        run.journal({"event": "run_started", "backend": "ray", "slots": 3, "pid": 7, "node": "a"})
        for step in (10, 20, 30):
            run.block(1).log_metrics(_metrics(step, checkpoint_step=20 if step == 30 else 0))
        at = reader.read().blocks[1].checkpoint_at
        gone = {"reason": "its process is gone", "backoff": 0.5}
        run.journal({"event": "block_restarting", "block": 1, "attempt": 1, "step": 30, **gone})
        run.journal({"event": "block_rolled_back", "block": 1, "attempt": 2, "step": 20, "rollbacks": 1})
        run.block(1).log_metrics(_metrics(25, None, checkpoint_step=20))
        block = reader.read().blocks[1]
    assert [(mark.kind, mark.step) for mark in block.marks] == [("restart", 30), ("rollback", 20)]
    assert (block.restarts, block.rollbacks, block.reason) == (1, 1, "its process is gone")
    assert block.losses.steps == [10, 20, 25]
    assert math.isnan(block.loss)
    assert (block.checkpoint_step, block.checkpoint_at) == (20, at)
    notices = [notice.text for notice in reader.view.notices if notice.block == 1]
    assert notices[0] == "restarting at step 30: backoff 0.5, its process is gone"


@pytest.mark.parametrize(
    "line",
    [
        {"event": "block_running", "block": 99, "attempt": 1, "step": 0},
        {"event": "block_running", "block": "x", "attempt": 1, "step": 0},
        {"event": "block_running", "block": 0},
        {"event": "run_started"},
        {"no": "event"},
        {"event": "block_running", "block": 0, "attempt": 1e999, "pid": 1, "node": "b", "device": "cpu"},
        {"event": "block_running", "block": 0, "attempt": 1, "pid": "../x", "node": "b", "device": "cpu"},
    ],
)
def test_lines_of_another_version_are_left_out(run: RunDirectory, line: dict[str, Any]) -> None:
    run.journal(line)
    with (run.storage.local_path / "events.jsonl").open("a") as file:  # type: ignore[operator]
        file.write(json.dumps({"event": 3, "time": "soon"}) + "\n")
    run.block(0).log_metrics({"step": "soon"})
    run.block(0).log_metrics(_metrics(1) | {"step": math.inf})
    run.block(0).log_metrics(_metrics(1, peak_memory="much"))
    view = RunReader(run).read()
    assert view.state is RunState.NEW
    assert view.blocks[0].recent == []


def test_the_newest_lines_of_metrics_are_kept_as_they_stand_there(run: RunDirectory) -> None:
    reader = RunReader(run)
    for step in range(1, 2 * RECENT):
        run.block(0).log_metrics(_metrics(step))
    run.block(0).log_metrics({"event": "rolled_back", "step": 5, "from_step": 9, "reason": "not finite", "attempt": 1})
    recent = reader.read().blocks[0].recent
    assert len(recent) == RECENT
    assert (recent[-1]["event"], recent[-2]["step"]) == ("rolled_back", 2 * RECENT - 1)
    assert reader.read().blocks[0].recent == recent


def test_where_the_workers_logs_are(run: RunDirectory) -> None:
    start = {"event": "run_started", "backend": "ray", "slots": 3, "pid": 7, "node": "a"}
    reader = RunReader(run)
    run.journal({**start, "worker_logs": "/logs"})
    assert reader.read().worker_logs == "/logs"
    run.journal({**start, "worker_logs": None})  # the next start has joined a cluster
    assert reader.read().worker_logs is None


def test_a_directory_that_is_gone(run: RunDirectory) -> None:
    reader = RunReader(run)
    reader.read()
    run.storage.remove_tree("")
    with pytest.raises(OSError, match="not there any more"):
        reader.read()


def test_a_driver_that_ends_while_its_lines_are_read_is_not_gone(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.journal({"event": "run_started", "backend": "ray", "slots": 3, "pid": 7, "node": "a"})
    here = {"pid": 8, "node": "b", "node_id": "n", "device": "cpu"}
    run.journal({"event": "block_running", "block": 0, "attempt": 1, "step": 0, **here})
    reader = RunReader(run)
    with driver_lock(run.storage):
        reader.read()
    lock = driver_lock(run.storage)
    lock.__enter__()
    journal = reader._journal.read

    def read_then_end() -> list[dict[str, Any]]:
        lines = journal()
        run.journal({"event": "block_stopped", "block": 0, "attempt": 1, "step": 0})
        run.journal({"event": "run_ended", "blocks": {}})
        lock.__exit__(None, None, None)
        return lines

    monkeypatch.setattr(reader._journal, "read", read_then_end)
    assert reader.read().state is RunState.RUNNING
    monkeypatch.undo()
    assert reader.read().state is RunState.STOPPED
    assert reader.view.blocks[0].reason is None


def test_a_wait_is_over_once_a_checkpoint_has_come_about(run: RunDirectory) -> None:
    full = {"event": "block_waiting", "block": 0, "attempt": 1, "step": 20, "reason": "no room"}
    with driver_lock(run.storage):
        run.journal({"event": "run_started", "backend": "ray", "slots": 3, "pid": 7, "node": "a"})
        run.journal(full)
        run.block(0).log_metrics(_metrics(20, checkpoint_step=10))
        run.block(0).log_metrics(_metrics(21, checkpoint_step=10))  # saved on the side
        reader = RunReader(run)
        assert reader.read().blocks[0].reason == "no room"
        run.block(0).log_metrics(_metrics(30, checkpoint_step=20))
        assert reader.read().blocks[0].reason is None
        assert RunReader(run).read().blocks[0].reason is None


def test_a_roll_back_that_the_next_driver_hears_of_again_is_one(run: RunDirectory) -> None:
    for _ in range(2):
        run.journal({"event": "run_started", "backend": "ray", "slots": 3, "pid": 7, "node": "a"})
        run.journal({"event": "block_rolled_back", "block": 1, "attempt": 2, "step": 20, "rollbacks": 1})
    block = RunReader(run).read().blocks[1]
    assert (block.rollbacks, len(block.marks)) == (1, 1)


def test_numbers_that_no_run_has_are_left_out(run: RunDirectory) -> None:
    """Of a run of others: a step beyond all floats, and times that no calendar has, would end whoever draws them."""
    run.block(0).log_metrics(_metrics(10**400))
    run.block(0).log_metrics(_metrics(10) | {"time": 1e300})
    run.journal({"event": "run_started", "time": 1e300, "backend": "ray", "slots": 3, "pid": 7, "node": "a"})
    view = RunReader(run).read()
    assert (view.fraction, view.starts, view.heard_at) == (0.0, 0, None)


def test_what_was_given_up_is_not_waited_for(run: RunDirectory) -> None:
    view = RunReader(run).read()
    first, second, third = view.blocks
    first.state, first.step, first.samples_per_second = BlockState.RUNNING, 50, 10.0
    second.state, third.state = BlockState.FAILED, BlockState.FINISHED
    assert view.all_seconds_left == view.seconds_left(first) == 50 * view.batch_size / 10
