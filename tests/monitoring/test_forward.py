from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.monitoring import forward as forwarding
from dbtrain.monitoring.forward import Memory, forward
from dbtrain.monitoring.run_view import RunView
from dbtrain.run_directory import RunDirectory


class Keeper:
    """A sink that remembers what it was given."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, float]] = []
        self.values: Mapping[str, float] = {}
        self.times: list[float] = []
        self.flushed = 0
        self.closed: RunView | None = None

    def log(self, block: int, step: int, when: float, values: Mapping[str, float]) -> None:
        self.told.append((block, step, values["loss"]))
        self.values = values
        self.times.append(when)

    def flush(self) -> None:
        self.flushed += 1

    def close(self, view: RunView) -> None:
        self.closed = view


@pytest.fixture
def run(small_config: Callable[..., RunConfig], tmp_path: Path) -> RunDirectory:
    return start_run(small_config(), tmp_path / "run")


def tell(run: RunDirectory, block: int, step: int, loss: float | None = 1.0, **more: Any) -> None:
    line = {"step": step, "loss": loss, "grad_norm": 0.5, "samples_per_second": 50.0, "checkpoint_step": 0}
    run.block(block).log_metrics(line | {"attempt": 1} | more)


def forward_to_the_end(run: RunDirectory) -> Keeper:
    """What a process of its own does that starts when the run has ended."""
    over = threading.Event()
    over.set()
    keeper = Keeper()
    forward(run, keeper, Memory.load(run, "sink"), over)
    return keeper


def test_every_line_once_also_when_the_run_goes_on(run: RunDirectory) -> None:
    tell(run, 0, 10, 3.0)
    tell(run, 1, 10, 4.0, note="text", fresh=True)
    first = forward_to_the_end(run)
    assert first.told == [(0, 10, 3.0), (1, 10, 4.0)]
    assert first.values.keys() == {
        "loss",
        "grad_norm",
        "samples_per_second",
        "checkpoint_step",
        "attempt",
        "fresh",
    }
    assert first.times == [run.block(index).metrics()[0]["time"] for index in (0, 1)]
    assert first.closed is not None
    tell(run, 1, 20, 2.0)
    assert forward_to_the_end(run).told == [(1, 20, 2.0)]
    assert Memory.load(run, "sink").id == Memory.load(run, "sink").id
    assert Memory.load(run, "sink").id != Memory.load(run, "another").id


def test_steps_only_rise_when_a_block_repeats_some(run: RunDirectory) -> None:
    for step, loss in ((10, 3.0), (20, 2.0), (30, None), (20, 2.0)):
        tell(run, 0, step, loss)
    run.block(0).log_metrics({"event": "rolled_back", "step": 20, "from_step": 30, "reason": "NaN", "attempt": 2})
    for step in (30, 40):
        tell(run, 0, step, 1.0)
    told = forward_to_the_end(run).told
    assert [step for _, step, _ in told] == [10, 20, 30, 40]
    assert math.isnan(told[2][2])


@pytest.mark.parametrize("kept", ["", "[]", '{"id": "x"}', '{"id": "x", "sent": {"0": "soon"}}', '{"sent": [1]}'])
def test_a_memory_that_cannot_be_read_begins_anew(run: RunDirectory, kept: str) -> None:
    run.storage.write_atomic("monitoring/sink.json", kept.encode())
    tell(run, 0, 10)
    assert len(forward_to_the_end(run).told) == 1
    assert json.loads(run.storage.read_bytes("monitoring/sink.json"))["sent"] == {"0": 10}


def test_lines_of_another_version_are_left_out(run: RunDirectory) -> None:
    run.block(0).log_metrics({"step": "soon", "loss": 1.0})
    run.block(0).log_metrics({"loss": 1.0})
    tell(run, 0, 10)
    assert len(forward_to_the_end(run).told) == 1


def test_what_a_running_block_tells_arrives_before_the_end(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "POLL_SECONDS", 0.01)
    ended, arrived = threading.Event(), threading.Event()

    class Told(Keeper):
        def flush(self) -> None:
            super().flush()
            arrived.set()

    keeper = Told()
    thread = threading.Thread(target=forward, args=(run, keeper, Memory.load(run, "sink"), ended))
    thread.start()
    try:
        tell(run, 2, 10)
        assert arrived.wait(60)
        assert keeper.closed is None
    finally:
        ended.set()
        thread.join(60)
    assert not thread.is_alive()
    assert (keeper.told, keeper.flushed) == ([(2, 10, 1.0)], 1)
    assert keeper.closed is not None
