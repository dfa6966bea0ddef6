"""One attempt at one block inside a worker, on any backend: opens the run, trains, says how it ended."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dbtrain.errors import UserError
from dbtrain.orchestration.backend import reason_of, traceback_of
from dbtrain.orchestration.events import (
    WorkerDied,
    WorkerError,
    WorkerEvent,
    WorkerFinished,
    WorkerProgress,
    WorkerStopped,
)
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import checkpoint_steps
from dbtrain.training.machine import machine_facts
from dbtrain.training.memory import is_out_of_memory, oom_advice
from dbtrain.training.progress import Progress
from dbtrain.training.room import Room
from dbtrain.training.seat import Seat
from dbtrain.training.team import has_lost_others
from dbtrain.training.trainer import BlockTrainer


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    kind: Literal["finished", "stopped", "lost", "error"]
    """`lost` is the end of a replica whose peers are gone; `error` that of code that raised."""
    step: int
    """Finished steps; -1 when the block could not be built."""
    reason: str = ""
    traceback: str = ""
    rows: tuple[int, ...] = ()
    """Numbers of the rows in the batch of the step that raised."""


class BlockSession:
    """Trains block `block` of the run at `run_uri` as attempt number `attempt`, alone or in one of several seats.

    `advance` belongs to one thread; `request_stop` and `progress` may be called from others.
    """

    def __init__(self, run_uri: str, block: int, attempt: int, seat: Seat | None = None):
        self._run_uri = run_uri
        self._block = block
        self._attempt = attempt
        self._seat = Seat() if seat is None else seat
        self._room = Room()
        self._run: RunDirectory | None = None
        self._trainer: BlockTrainer | None = None
        self._reports: Iterator[Progress] | None = None
        self._latest: Progress | None = None
        self._stop = False
        self._threads = 1

    def request_stop(self) -> None:
        """Finish the step in hand, save, and leave; also before there is anything to stop."""
        self._stop = True
        self._room.give_up()  # the trainer may be waiting before it is built
        trainer = self._trainer
        if trainer is not None:
            trainer.request_stop()

    def progress(self) -> Progress | None:
        """The newest report, with the step and the trouble of this moment; None before the block is built, unless that
        has to wait for something."""
        trainer, latest, run, trouble = self._trainer, self._latest, self._run, self._room.trouble
        if trainer is None or latest is None:
            return None if run is None or trouble is None else self._waiting(run, trouble)
        return replace(latest, step=trainer.step, trouble=trainer.trouble)

    def _waiting(self, run: RunDirectory, trouble: str) -> Progress:
        step = max(checkpoint_steps(run.block(self._block)), default=0)
        return Progress(self._block, self._attempt, step, run.plan.steps, math.nan, 0.0, step, False, trouble)

    def advance(self) -> Progress | Outcome:
        """Train up to the next report. An Outcome is the last; what the trainer raises becomes one."""
        try:
            return self._advance()
        except Exception as error:
            # The border of the worker: a bug or a user's mistake is told to the driver, which decides what
            # follows.
            trainer = self._trainer
            step, rows = (-1, ()) if trainer is None else (trainer.step, trainer.rows_in_hand())
            reason = reason_of(error)
            if self._run is not None and is_out_of_memory(error):
                reason = oom_advice(self._run.config, self._run.plan, self._block)
            kind: Literal["lost", "error"] = "lost" if has_lost_others(error, self._seat) else "error"
            outcome = Outcome(kind, step, reason, traceback_of(error), rows)
            self.close()
            return outcome

    def close(self) -> None:
        """Let a checkpoint that is being written come to its end, and drop the block."""
        trainer, self._trainer, self._reports = self._trainer, None, None
        if trainer is not None:
            # What fails here has failed the attempt before, or belongs to an attempt that is given up.
            with contextlib.suppress(Exception):
                trainer.close()

    def _advance(self) -> Progress | Outcome:
        if self._reports is None:
            run = self._run = RunDirectory.open(self._run_uri)
            self._threads = run.plan.threads
            torch.set_num_threads(self._threads)
            self._trainer = BlockTrainer(run, self._block, self._attempt, self._seat, self._room)
            if self._stop:
                self._trainer.request_stop()
            self._tell_who(run, self._trainer)
            self._reports = self._trainer.train()
        # Again each time: in the driver's own process others may have changed it since.
        torch.set_num_threads(self._threads)
        report = next(self._reports, None)
        if report is not None:
            self._latest = report
            return report
        assert self._latest is not None, "the trainer reports at least once"
        self.close()
        return Outcome("finished" if self._latest.done else "stopped", self._latest.step)

    def _tell_who(self, run: RunDirectory, trainer: BlockTrainer) -> None:
        """Leave behind where and with what this attempt trains, and from which step on it does."""
        if self._seat.replica > 0:
            return  # one writer a block
        facts = {"attempt": self._attempt, "step": trainer.step, "replicas": self._seat.replicas}
        # Nobody needs it to train: storage that is full or away is the business of the next checkpoint.
        with contextlib.suppress(UserError, OSError):
            run.block(self._block).check_fence(self._attempt)
            run.block(self._block).log_worker({**facts, **machine_facts(trainer.device)})


def event_of(report: Progress | Outcome, time: float, block: int, attempt: int) -> WorkerEvent:
    """What the coordinator hears of a report."""
    if isinstance(report, Progress):
        return WorkerProgress(
            time,
            block,
            attempt,
            report.step,
            report.loss,
            report.samples_per_second,
            report.checkpoint_step,
            report.trouble,
            report.rollbacks,
        )
    match report.kind:
        case "finished":
            return WorkerFinished(time, block, attempt, report.step)
        case "stopped":
            return WorkerStopped(time, block, attempt, report.step)
        case "lost":
            return WorkerDied(time, block, attempt, report.reason)
        case "error":
            return WorkerError(time, block, attempt, report.reason, report.step, report.traceback, report.rows)
