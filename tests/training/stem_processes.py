"""Blocks with averaged stems in processes of their own, as a backend would run them, but paced by the test."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch
from torch import Tensor

from dbtrain.run_directory import RunDirectory
from dbtrain.training.averaging import read_ledger
from dbtrain.training.meeting import MeetingPlace, join
from dbtrain.training.seat import Seat
from dbtrain.training.trainer import BlockTrainer

_SPAWN = multiprocessing.get_context("spawn")
_DEADLINE = 100.0


class _Paced(BlockTrainer):
    """Goes no further than it may."""

    limit: Synchronized[int]
    reached: Synchronized[int]

    def _train_step(self) -> Tensor:
        self.reached.value = self.step
        while self.step >= self.limit.value:
            time.sleep(0.01)
        return super()._train_step()


def _train(
    uri: str, block: int, attempt: int, meeting: str, limit: Synchronized[int], reached: Synchronized[int]
) -> None:
    torch.set_num_threads(1)
    with closing(_Paced(RunDirectory.open(uri), block, attempt, Seat(meeting=meeting))) as trainer:
        trainer.limit, trainer.reached = limit, reached
        for progress in trainer.train():
            if progress.done:
                reached.value = trainer.step


class Workers:
    """A process a block, and the store in which they meet; ends them all on closing."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._place = MeetingPlace("127.0.0.1")
        self._blocks = range(len(run.plan.blocks))
        self._limits = [_SPAWN.Value("q", 0) for _ in self._blocks]
        self._reached = [_SPAWN.Value("q", -1) for _ in self._blocks]
        self._attempts: dict[int, int] = {}
        self._live: dict[int, int] = {}
        self._processes: dict[int, BaseProcess] = {}

    def start(self, *blocks: int) -> None:
        """A new attempt at each; all are told of before any of them runs."""
        for block in blocks:
            self._attempts[block] = self._live[block] = self._attempts.get(block, 0) + 1
        self._place.tell_live(self._live)
        for block in blocks:
            shared = (self._limits[block], self._reached[block])
            shared[1].value = -1
            arguments = (self._run.uri, block, self._attempts[block], self._place.address, *shared)
            self._processes[block] = _SPAWN.Process(target=_train, args=arguments, daemon=True)
            self._processes[block].start()

    def allow(self, step: int, *blocks: int) -> None:
        """Let them finish so many steps."""
        for block in blocks:
            self._limits[block].value = step

    def wait(self, step: int, *blocks: int) -> None:
        """Until they have finished so many steps and what belongs to them."""
        for block in blocks:
            _wait(lambda block=block: self._reached[block].value >= step, f"block {block} reaches step {step}")

    def wait_arrivals(self, *blocks: int) -> None:
        """Until they stand in the open meeting."""
        store = join(self._place.address, _DEADLINE)
        _wait(lambda: {*blocks} <= read_ledger(store)[1].arrived.keys(), f"blocks {blocks} arrive")

    def kill(self, block: int) -> None:
        """End it with SIGKILL, and tell the others as the driver would."""
        process = self._processes.pop(block)
        process.kill()
        process.join()
        self.bury(block)

    def bury(self, block: int) -> None:
        """Nobody needs to wait for it any more."""
        del self._live[block]
        self._place.tell_live(self._live)

    def signal(self, block: int, number: signal.Signals) -> None:
        """Send a signal to its process."""
        pid = self._processes[block].pid
        assert pid is not None
        os.kill(pid, number)

    def run_to_end(self) -> None:
        """Train all that run to their last step; each is buried when it leaves."""
        self.allow(self._run.plan.steps, *self._live)
        waiting = dict(self._processes)
        deadline = time.monotonic() + _DEADLINE
        while waiting and time.monotonic() < deadline:
            for block, process in list(waiting.items()):
                process.join(0.05)
                if process.exitcode is not None:
                    assert process.exitcode == 0, f"block {block}: {process.exitcode}"
                    del waiting[block]
                    self.bury(block)
        assert not waiting, f"blocks {sorted(waiting)} have not come to an end"

    def close(self) -> None:
        """End what is left."""
        for process in self._processes.values():
            process.kill()
            process.join()


def meetings(run: RunDirectory, block: int, attempt: int = 1) -> list[dict[str, Any]]:
    """What a block's metrics tell of its meetings."""
    lines: Iterable[dict[str, Any]] = run.block(block).metrics()
    return [meeting for line in lines if line["attempt"] == attempt for meeting in line["meetings"]]


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)
