"""What the journal says of a block, and what it does on a full disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from feeding import feed, fresh, nodes_of, progress, started
from small_disks import fill, small_disk
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.orchestration.coordinator import step
from dbtrain.orchestration.events import (
    CapacityChanged,
    Event,
    ScaleRequested,
    StopRequested,
    Tick,
    WorkerDied,
    WorkerError,
    WorkerFinished,
    WorkerStopped,
)
from dbtrain.orchestration.journal import Journal, describe
from dbtrain.orchestration.state import BlockStatus, CoordinatorState, Policy

MakeConfig = Callable[..., RunConfig]


def lines(state: CoordinatorState, event: Event) -> list[dict[str, Any]]:
    """The journal's lines for one event."""
    after, _ = step(state, event)
    pairs = zip(state.blocks, after.blocks, strict=True)
    return [line for old, new in pairs if old is not new for line in describe(old, new, event)]


def running(**fields: Any) -> CoordinatorState:
    """A block at step 20 of its first attempt, on node a of two."""
    state = fresh([BlockStatus(0, **fields)], slots={"a": 1, "b": 1}, policy=Policy(max_restarts=1, slice_steps=50))
    return feed(state, Tick(0.0), started(1.0, 0, 1, "a"), progress(2.0, 0, 1, step=20))[0]


LINE = {"block": 0, "attempt": 1, "step": 20}


def test_progress_alone_is_not_worth_a_line() -> None:
    assert lines(running(), progress(3.0, 0, 1, step=30, checkpoint=10)) == []


def test_a_start_and_an_answer() -> None:
    state = fresh([BlockStatus(0), BlockStatus(1, replicas=2)], slots=1, policy=Policy(slice_steps=50))
    start = {"event": "block_starting", "block": 0, "attempt": 1, "step": 0, "restarts": 0, "replicas": 1, "until": 50}
    assert lines(state, Tick(0.0)) == [start]
    state, _ = feed(state, Tick(0.0))
    answer = {"event": "block_running", "block": 0, "attempt": 1, "step": 0}
    place = {"pid": 100, "node": "n", "node_id": "n", "device": "cpu"}
    assert lines(state, started(1.0, 0, 1)) == [{**answer, **place}]


def test_a_death_with_its_reason_and_back_off() -> None:
    expected = {"event": "block_restarting", **LINE, "reason": "killed", "backoff": 0.5}
    assert lines(running(), WorkerDied(3.0, 0, 1, "killed")) == [expected]


def test_an_error_with_its_rows_and_traceback() -> None:
    event = WorkerError(3.0, 0, 1, "ValueError: bad", 20, "Traceback ...", rows=(4, 9))
    (line,) = lines(running(error_step=20), event)
    assert line == {
        "event": "block_failed",
        **LINE,
        "reason": "ValueError: bad",
        "rows": [4, 9],
        "traceback": "Traceback ...",
    }


def test_ends() -> None:
    assert lines(running(), WorkerFinished(3.0, 0, 1, 90)) == [{"event": "block_finished", **LINE, "step": 90}]
    state, _ = feed(running(), StopRequested(3.0))
    assert lines(state, WorkerStopped(4.0, 0, 1, 21)) == [{"event": "block_stopped", **LINE, "step": 21}]


def test_a_scaling_and_the_leave_that_follows() -> None:
    asked = [
        {"event": "block_scaled", **LINE, "replicas": 2},
        {"event": "block_leaving", **LINE, "reason": "it goes on with 2 workers"},
    ]
    assert lines(running(), ScaleRequested(3.0, 0, 2)) == asked
    state, _ = feed(running(), ScaleRequested(3.0, 0, 2), CapacityChanged(3.0, ()))
    left = {"event": "block_paused", **LINE, "step": 25, "reason": "it goes on with 2 workers"}
    assert lines(state, WorkerStopped(4.0, 0, 1, 25)) == [left]


def test_trouble_is_told_when_it_begins_and_a_roll_back_each_time() -> None:
    waiting = progress(3.0, 0, 1, step=20, trouble="the disk is full")
    assert lines(running(), waiting) == [{"event": "block_waiting", **LINE, "reason": "the disk is full"}]
    state, _ = feed(running(), waiting)
    assert lines(state, progress(4.0, 0, 1, step=20, trouble="the disk is full")) == []
    (before,) = running().blocks
    rolled = list(describe(before, BlockStatus(0, before.state, attempt=1, step=20, rollbacks=1), waiting))
    assert rolled == [{"event": "block_rolled_back", **LINE, "rollbacks": 1}]


def test_a_slow_worker_with_its_node() -> None:
    state, _ = feed(fresh(3, slots=3), Tick(0.0), *(started(0.0, block, 1) for block in range(3)))
    for time in (5.0, 10.0, 15.0):
        news = [progress(time, block, 1, step=20, speed=100.0 if block else 10.0) for block in range(3)]
        state, _ = feed(state, *news)
        told = lines(state, Tick(time))
        state, _ = feed(state, Tick(time))
    reason = "takes 10.0 times as long for a layer as the median worker"
    assert told == [{"event": "block_slow", **LINE, "node": "n", "reason": reason}]


def test_a_node_that_leaves_is_worth_no_line_of_a_block() -> None:
    assert lines(running(), CapacityChanged(3.0, nodes_of({"a": 1}))) == []


def test_a_full_disk_holds_lines_back_and_nobody_up(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = start_run(make_config(), disk / "run")
        journal = Journal(run)
        journal.write({"event": "first"})
        filler = fill(disk)
        with caplog.at_level(logging.WARNING):
            for number in range(200):  # more than what is left of the journal's last page
                journal.write({"event": "held", "number": number, "padding": "x" * 100})
        assert caplog.text.count("the journal cannot be written just now") == 1
        assert len(run.events()) < 201
        filler.unlink()
        journal.write({"event": "last"})
        written = run.events()
        assert [line["event"] for line in written] == ["first", *["held"] * 200, "last"]
        assert [line["number"] for line in written[1:-1]] == list(range(200))


def test_what_is_still_held_back_at_the_end_is_said_to_be_lost(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = start_run(make_config(), disk / "run")
        journal = Journal(run)
        fill(disk)
        for number in range(200):
            journal.write({"event": "held", "number": number, "padding": "x" * 100})
        written = len(run.events())
        with caplog.at_level(logging.WARNING):
            journal.close()
        assert f"the last {200 - written} lines of the journal could not be written" in caplog.text


def test_storage_that_goes_away_holds_lines_back_too(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(make_config(), tmp_path / "run")
    journal, write = Journal(run), run.journal

    def refuse(line: dict[str, Any]) -> None:
        raise UserError("cannot write")

    monkeypatch.setattr(run, "journal", refuse)
    with pytest.raises(UserError):  # a run that cannot write its first line does not begin
        journal.write({"event": "first"})
    monkeypatch.setattr(run, "journal", write)
    journal.flush()
    monkeypatch.setattr(run, "journal", refuse)
    journal.write({"event": "second"})
    monkeypatch.setattr(run, "journal", write)
    journal.write({"event": "third"})
    assert [line["event"] for line in run.events()] == ["first", "second", "third"]
