from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.monitoring.report.faults import BlockLines, Fault, faults, survived, told
from dbtrain.monitoring.report.gather import gather
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.stopping import StopToken
from dbtrain.run_directory import RunDirectory
from dbtrain.training.rollback import NonFiniteError
from dbtrain.training.trainer import BlockTrainer

SmallConfig = Callable[..., RunConfig]
NODES = {"a" * 56: 2, "b" * 56: 2}


def _start(time: float, nodes: object = NODES) -> dict[str, Any]:
    return {"event": "run_started", "time": time, "nodes": nodes}


def _block(time: float, event: str, block: int = 0, attempt: int = 1, step: int = 0, **more: Any) -> dict[str, Any]:
    return {"event": f"block_{event}", "time": time, "block": block, "attempt": attempt, "step": step, **more}


def _metrics(time: float, step: int, attempt: int = 1) -> dict[str, Any]:
    return {"time": time, "step": step, "attempt": attempt, "loss": 1.0}


def _worker(time: float, step: int, attempt: int) -> dict[str, Any]:
    return {"time": time, "step": step, "attempt": attempt}


def _disturbed(config: RunConfig, path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> RunDirectory:
    """A real run in this process: block 0's worker raises once and is stopped later on, block 1 rolls back, and another
    driver ends it."""
    once, stop = {"raise", "roll back"}, StopToken()
    train_step, save = BlockTrainer._train_step, BlockTrainer._save

    def raising(trainer: BlockTrainer) -> Tensor:
        if trainer.index == 0 and trainer.step == 5 and "raise" in once:
            once.remove("raise")
            raise RuntimeError(reason)
        return train_step(trainer)

    def rolling(trainer: BlockTrainer) -> None:
        if trainer.index == 1 and trainer.step == 4 and "roll back" in once:
            once.remove("roll back")
            raise NonFiniteError("values were not finite", 4, 2)
        save(trainer)

    class StopAt:
        def update(self, snapshot: Snapshot) -> None:
            if snapshot.blocks[0].attempt == 2 and snapshot.blocks[0].step >= 7:
                stop.request()

    monkeypatch.setattr(BlockTrainer, "_train_step", raising)
    monkeypatch.setattr(BlockTrainer, "_save", rolling)
    train_run(config, path, watch=StopAt(), stop=stop)
    assert train_run(config, path).ok
    return RunDirectory.open(path)


def test_what_a_real_run_survived(small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(training={"steps": 10}, logging={"every": 1}, checkpoints={"every": 2})
    run = _disturbed(config, tmp_path / "run", monkeypatch, "it <fell> over")
    found = gather(run).ours.faults
    kinds = {(fault.kind, fault.block): fault for fault in found}
    assert len(found) == len(kinds) == 3
    restart, back = kinds["restart", 0], kinds["roll-back", 1]
    start = kinds["driver started again", None]
    # Saved every two steps; the fifth was told and not saved.
    assert (restart.step, restart.lost, restart.reason) == (5, 1, "RuntimeError: it <fell> over")
    [line] = [line for line in run.events() if line["event"] == "block_restarting"]
    assert restart.time == line["time"]
    assert restart.seconds is not None
    assert restart.seconds >= line["backoff"] - 0.01
    assert (back.step, back.lost, back.seconds) == (4, 2, None)
    assert (start.reason, start.lost) == ("the run had ended on request", 0)
    assert survived(found) == 3


def test_a_driver_that_died_costs_every_block_what_it_had_not_saved() -> None:
    journal = [
        _start(0.0),
        _block(1.0, "running", 0),
        _block(1.0, "running", 1),
        _start(100.0),
        _block(100.5, "starting", 0, 2, 20),
    ]
    blocks = [
        BlockLines([_metrics(50.0, 25)], [_worker(2.0, 0, 1), _worker(107.0, 20, 2)]),
        BlockLines([_metrics(60.0, 37)], [_worker(2.0, 0, 1), _worker(104.0, 30, 2)]),
    ]
    assert faults(journal, blocks) == [
        Fault(100.0, "driver started again", None, "the driver before was gone without a word", None, 12, 4.0)
    ]


def test_nodes_that_leave_and_come() -> None:
    after = {"a" * 56: 2, "c" * 56: 1}
    journal = [_start(0.0), {"event": "nodes_changed", "time": 5.0, "nodes": after}]
    found = faults(journal, [BlockLines([], [])])
    assert [(fault.kind, fault.reason) for fault in found] == [
        ("node lost", "node bbbbbbbbbbbb"),
        ("node joined", "node cccccccccccc"),
    ]
    assert survived(found) == 1


def test_a_restart_that_its_own_driver_did_not_live_to_see() -> None:
    """The next driver's start tells what it cost; nobody counts it twice."""
    journal = [_start(0.0), _block(10.0, "restarting", step=9, reason="gone"), _start(50.0)]
    [restart, start] = faults(journal, [BlockLines([_metrics(8.0, 7)], [_worker(55.0, 4, 2)])])
    assert (restart.step, restart.lost, restart.seconds) == (9, None, None)
    assert (start.lost, start.seconds) == (5, 5.0)


def test_a_worker_that_is_lost_before_it_trains_costs_once() -> None:
    journal = [
        _start(0.0),
        _block(10.0, "restarting", 0, 1, 9, reason="gone"),
        _block(12.0, "restarting", 1, 1, 3, reason="another block's"),
        _block(20.0, "restarting", 0, 2, 9, reason="gone again"),
    ]
    found = faults(
        journal, [BlockLines([_metrics(8.0, 9)], [_worker(1.0, 0, 1), _worker(30.0, 5, 3)]), BlockLines([], [])]
    )
    assert [(fault.lost, fault.seconds) for fault in found if fault.block == 0] == [(None, None), (4, 10.0)]


def test_a_worker_of_another_driver_that_is_lost_before_it_trains_costs_once() -> None:
    journal = [_start(0.0), _start(50.0), _block(60.0, "restarting", 0, 2, 9, reason="gone")]
    start, restart = faults(journal, [BlockLines([_metrics(8.0, 9)], [_worker(1.0, 0, 1), _worker(70.0, 5, 3)])])
    assert (start.lost, start.seconds, restart.lost, restart.seconds) == (None, None, 4, 10.0)


def test_a_run_of_an_earlier_version_does_not_know_the_cost() -> None:
    journal = [_start(0.0), _block(10.0, "restarting", step=9, reason="gone"), _block(11.0, "running", 0, 2, 9)]
    [restart] = faults(journal, [BlockLines([_metrics(8.0, 7), _metrics(20.0, 8, 2)], [])])
    assert (restart.kind, restart.lost, restart.seconds) == ("restart", None, None)


def test_who_gave_up_and_who_waited() -> None:
    journal = [
        _start(0.0),
        _block(1.0, "waiting", step=3, reason="no room"),
        _block(2.0, "slow", step=4, reason="half as fast", node="n"),
        _block(3.0, "leaving", step=4, reason="it is slow here"),
        _block(4.0, "failed", step=5, reason="twice at step 5"),
    ]
    found = faults(journal, [BlockLines([], [])])
    assert [(fault.kind, fault.step) for fault in found] == [("waiting", 3), ("slow", 4), ("moved", 4), ("given up", 5)]
    assert survived(found) == 0


@pytest.mark.parametrize(
    "line",
    [
        {"event": "block_restarting", "time": 1.0, "block": 7, "step": 1},
        {"event": "block_restarting", "time": 1.0, "block": [0], "step": 1},
        {"event": "block_restarting", "time": "soon", "block": 0, "step": 1},
        {"event": "block_restarting", "time": float("nan"), "block": 0, "step": 1},
        {"event": "nodes_changed", "time": 1.0, "nodes": "all"},
        {"event": 7, "time": 1.0},
        {},
    ],
)
def test_lines_that_nobody_of_ours_wrote(line: dict[str, Any]) -> None:
    assert faults([_start(0.0, {}), line], [BlockLines([], [])]) == []
    with contextlib.suppress(KeyError):
        line["step"] = "far"
    assert told([line]) == []
