"""The loop between the coordinator, a backend, the journal and whoever watches or asks for something."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from dataclasses import dataclass
from typing import Protocol

from dbtrain.errors import UserError
from dbtrain.orchestration.backend import Backend, Clock
from dbtrain.orchestration.coordinator import step
from dbtrain.orchestration.events import (
    CapacityChanged,
    Event,
    KillWorker,
    ScaleRequested,
    StartWorker,
    StopRequested,
    StopWorker,
    Tick,
)
from dbtrain.orchestration.journal import Journal, describe
from dbtrain.orchestration.requests import ANSWER, Request, collect, named_blocks, why_not_scale
from dbtrain.orchestration.state import BlockStatus, CoordinatorState
from dbtrain.orchestration.stopping import StopToken
from dbtrain.plan import Plan
from dbtrain.run_directory import RunDirectory

POLL_SECONDS = 0.25
"""How long the loop waits for news, at most."""
NODES_EVERY = 2.0
"""Seconds between two looks at which nodes there are."""
AWAY = 5.0
"""Seconds between two turns of the loop that say that it was held up."""
REQUESTS_EVERY = 1.0
"""Seconds between two looks at what is asked for in the run directory."""


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


class Watchers:
    """Several watchers as one."""

    def __init__(self, *watchers: Watcher | None):
        self._watchers = [watcher for watcher in watchers if watcher is not None]

    def update(self, snapshot: Snapshot) -> None:
        """Tell them all, in their order."""
        for watcher in self._watchers:
            watcher.update(snapshot)


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
        self._journal = Journal(run)
        self._next_nodes = self._next_requests = self._last_turn = clock()
        self._away = False
        self._answered: set[str] = set()

    def loop(self) -> CoordinatorState:
        """Run to the end; the journal gets a line for the start, every change of a block, and the end."""
        self._journal.write(
            {
                "event": "run_started",
                "backend": self._backend.name,
                "slots": min(self._state.slots, sum(block.replicas for block in self._state.blocks)),
                "nodes": {node.id: node.slots for node in self._state.nodes},
                "order": list(self._state.order),
                "pid": os.getpid(),
                "node": platform.node(),
                **self._backend.facts(),
            }
        )
        self._show()
        collect(self._run.storage)  # what was asked of an earlier driver
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
                if not self._was_away():
                    self._apply(Tick(self._clock()))
                self._look_around()
        except BaseException as error:
            # The journal may be what failed; the first error is the one to tell.
            with contextlib.suppress(UserError):
                self._journal.write({"event": "run_interrupted", "reason": f"{type(error).__name__}: {error}"})
            raise
        self._journal.write({"event": "run_ended", "blocks": {str(b.index): b.state.value for b in self._state.blocks}})
        self._journal.close()
        return self._state

    def _was_away(self) -> bool:
        """Whether this process itself did nothing for a while, held up by its storage or frozen.

        Then all have to be asked once more before anybody is taken to hang.
        """
        now = self._clock()
        away, self._last_turn = now - self._last_turn > AWAY and not self._away, now
        self._away = away
        return away

    def _look_around(self) -> None:
        """Now and then: which nodes there are, and what somebody asks for."""
        now = self._clock()
        if now >= self._next_nodes:
            self._next_nodes = now + NODES_EVERY
            nodes = self._backend.nodes()
            if nodes != self._state.nodes:
                self._journal.write({"event": "nodes_changed", "nodes": {node.id: node.slots for node in nodes}})
                self._apply(CapacityChanged(now, nodes))
        if now >= self._next_requests:
            self._next_requests = now + REQUESTS_EVERY
            for request in collect(self._run.storage):
                if request.id not in self._answered:
                    self._answered.add(request.id)
                    self._answer(request)
            self._journal.flush()

    def _answer(self, request: Request) -> None:
        line = {"event": ANSWER, "request": request.id, "kind": request.kind}
        if request.kind == "stop":
            self._stop.request()
            self._journal.write({**line, "done": True})
            return
        reason = why_not_scale(self._run.config, self._state, request)
        if reason is None and request.replicas > 1 and not self._backend.replicates:
            reason = f"the backend {self._backend.name} trains a block with one worker"
        if reason is not None:
            self._journal.write({**line, "done": False, "reason": reason})
            return
        blocks = named_blocks(self._state, request)
        self._journal.write({**line, "done": True, "blocks": list(blocks), "replicas": request.replicas})
        for block in blocks:
            self._apply(ScaleRequested(self._clock(), block, request.replicas))

    def _apply(self, event: Event) -> None:
        before = self._state
        self._state, actions = step(before, event)
        if self._state is before:
            return
        for old, new in zip(before.blocks, self._state.blocks, strict=True):
            if old is not new:
                for line in describe(old, new, event):
                    self._journal.write(line)
        for action in actions:
            match action:
                case StartWorker():
                    self._backend.start(action)
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
