"""The loop between the coordinator, a backend, the journal and whoever watches."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from dataclasses import dataclass
from typing import Protocol

from dbtrain.errors import UserError
from dbtrain.orchestration.backend import Backend, Clock
from dbtrain.orchestration.coordinator import BlockStatus, CoordinatorState, step
from dbtrain.orchestration.events import Event, KillWorker, StartWorker, StopRequested, StopWorker, Tick
from dbtrain.orchestration.journal import describe
from dbtrain.orchestration.stopping import StopToken
from dbtrain.plan import Plan
from dbtrain.run_directory import RunDirectory

POLL_SECONDS = 0.25
"""How long the loop waits for news, at most."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, for those who watch."""

    run: str
    """Path or URI of the run directory."""
    plan: Plan
    blocks: tuple[BlockStatus, ...]
    slots: int
    stopping: bool


class Watcher(Protocol):
    """Looks on. Called in the driver's thread after every change, so it should be quick."""

    def update(self, snapshot: Snapshot) -> None:
        """The run has changed."""
        ...


class Driver:
    """Carries out what the coordinator wants, until every block has ended."""

    def __init__(
        self,
        run: RunDirectory,
        state: CoordinatorState,
        backend: Backend,
        stop: StopToken,
        watch: Watcher | None = None,
        clock: Clock = time.monotonic,
    ):
        self._run = run
        self._state = state
        self._backend = backend
        self._stop = stop
        self._watch = watch
        self._clock = clock

    def loop(self) -> CoordinatorState:
        """Run to the end; the journal gets a line for the start, every change of a block, and the end."""
        self._run.journal(
            {
                "event": "run_started",
                "backend": self._backend.name,
                "slots": self._state.slots,
                "order": list(self._state.order),
                "pid": os.getpid(),
                "node": platform.node(),
                **self._backend.facts(),
            }
        )
        self._show()
        try:
            self._apply(Tick(self._clock()))
            while not self._state.done:
                events = self._backend.poll(POLL_SECONDS)
                # A stop goes before what it has brought about: a worker that left because of it is no
                # surprise.
                if self._stop.requested and not self._state.stopping:
                    self._apply(StopRequested(self._clock()))
                for event in events:
                    self._apply(event)
                self._apply(Tick(self._clock()))
        except BaseException as error:
            # The journal may be what failed, on a full disk; the first error is the one to tell.
            with contextlib.suppress(UserError):
                self._run.journal({"event": "run_interrupted", "reason": f"{type(error).__name__}: {error}"})
            raise
        self._run.journal({"event": "run_ended", "blocks": {str(b.index): b.state.value for b in self._state.blocks}})
        return self._state

    def _apply(self, event: Event) -> None:
        before = self._state
        self._state, actions = step(before, event)
        if self._state is before:
            return
        for old, new in zip(before.blocks, self._state.blocks, strict=True):
            if old is not new and (line := describe(old, new, event)) is not None:
                self._run.journal(line)
        for action in actions:
            match action:
                case StartWorker(block, attempt):
                    self._backend.start(block, attempt)
                case StopWorker(block, attempt):
                    self._backend.stop(block, attempt)
                case KillWorker(block, attempt):
                    self._backend.kill(block, attempt)
        self._show()

    def _show(self) -> None:
        if self._watch is not None:
            state = self._state
            self._watch.update(
                Snapshot(self._run.storage.uri, self._run.plan, state.blocks, state.slots, state.stopping)
            )
