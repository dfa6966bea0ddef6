"""The Ray actors that train one block together: started, asked and ended as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from dbtrain.orchestration.backend import Clock
from dbtrain.orchestration.events import WorkerAlive, WorkerDied, WorkerEvent, WorkerStarted
from dbtrain.orchestration.ray_worker import Place
from dbtrain.orchestration.session import Outcome, event_of

_LOST_PATIENCE = 5.0
"""Seconds from the news that a member has lost the others until the group ends; the death of one of them, which says
why, is heard of later."""
_OUT_OF_MEMORY = "killed due to the node running low on memory"


@dataclass
class _Member:
    actor: Any
    run: Any
    """The reference of the long call; it comes out when the worker leaves."""
    asked_place: Any
    """The reference of the first question."""
    place: Place | None = None
    outcome: Outcome | None = None
    asked: Any = None
    """The reference of the question that is out: a worker that hangs is asked once, not waited for."""


class WorkerGroup:
    """All workers of one attempt at a block; mostly there is just one."""

    def __init__(
        self,
        block: int,
        attempt: int,
        device: str,
        actors: Sequence[Any],
        clock: Clock,
        out_of_memory: Callable[[], str],
    ):
        """
        Args:
            block: its number.
            attempt: that of the coordinator.
            device: what kind they train on.
            actors: in the order of their seats.
            clock: for the times of events.
            out_of_memory: what to tell when a node had no memory left for one of them.
        """
        self.block = block
        self.attempt = attempt
        self._device = device
        self._clock = clock
        self._out_of_memory = out_of_memory
        self._members = [_Member(actor, actor.run.remote(), actor.place.remote()) for actor in actors]
        self._started = False
        self._lost_at: float | None = None

    def ask(self) -> None:
        """Ask how it stands, unless some of the members still owe an answer: one that hangs shall be noticed."""
        if self._started and not any(member.asked is not None for member in self._members):
            for member in self._members:
                if member.outcome is None:
                    member.asked = member.actor.progress.remote()

    def awaited(self) -> list[Any]:
        """The references whose coming out is news; answers of `ask` come within milliseconds and are none."""
        ends = [member.run for member in self._members if member.outcome is None]
        return ends + [member.asked_place for member in self._members if member.place is None]

    def hear(self) -> tuple[list[WorkerEvent], bool]:
        """What has happened, in the order in which it happened, and whether that was the end of the attempt."""
        events: list[WorkerEvent] = []
        member = self._members[0]
        try:
            for member in self._members:
                if member.place is None and _ready(member.asked_place):
                    member.place = ray.get(member.asked_place)
            if not self._started and all(member.place is not None for member in self._members):
                self._started = True
                events.append(self._started_event())
            events += self._answers()
            for member in self._members:
                if member.outcome is None and _ready(member.run):
                    member.outcome = ray.get(member.run)
        except ray.exceptions.RayError as error:
            # The session in the worker turns whatever its code raises into an answer, so this is Ray's own
            # trouble: a dead process or node. If the actor is only out of reach, killing it makes sure that
            # it stays gone.
            node_id = "" if member.place is None else member.place.node_id
            reason = _cause(error)
            if _OUT_OF_MEMORY in reason:
                # Ray's own message is a page long, and knows nothing of blocks.
                reason = f"Ray ended the worker's process, as its node ran low on memory; {self._out_of_memory()}"
            return [*events, WorkerDied(self._clock(), self.block, self.attempt, reason, node_id)], True
        end = self._end_event()
        return (events, False) if end is None else ([*events, end], True)

    def stop(self) -> None:
        """Ask all to save and leave."""
        for member in self._members:
            member.actor.stop.remote()

    def kill(self) -> None:
        """End all processes."""
        for member in self._members:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(member.actor, no_restart=True)

    def _started_event(self) -> WorkerStarted:
        place = self._members[0].place
        assert place is not None
        device = self._device + (f":{','.join(place.gpus)}" if place.gpus else "")
        return WorkerStarted(self._clock(), self.block, self.attempt, place.pid, place.node, device, place.node_id)

    def _answers(self) -> list[WorkerEvent]:
        """What the first member has reported, once all have answered."""
        asked = [member for member in self._members if member.asked is not None]
        if not asked or not all(_ready(member.asked) for member in asked):
            return []
        reports = [ray.get(member.asked) for member in asked]
        for member in asked:
            member.asked = None
        if asked[0] is not self._members[0] or reports[0] is None:
            return [WorkerAlive(self._clock(), self.block, self.attempt)]
        return [event_of(reports[0], self._clock(), self.block, self.attempt)]

    def _end_event(self) -> WorkerEvent | None:
        now = self._clock()
        outcomes = [member.outcome for member in self._members if member.outcome is not None]
        lost = next((outcome for outcome in outcomes if outcome.kind == "lost"), None)
        if lost is not None and self._lost_at is None:
            self._lost_at = now
        chosen = next((outcome for outcome in outcomes if outcome.kind == "error"), None)
        if chosen is None and len(outcomes) == len(self._members):
            chosen = lost or outcomes[0]
        if chosen is None and self._lost_at is not None and now - self._lost_at >= _LOST_PATIENCE:
            chosen = lost
        return None if chosen is None else event_of(chosen, now, self.block, self.attempt)


def _ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0)[0])


def _cause(error: Exception) -> str:
    """The part of Ray's message that differs from case to case, on one line."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    return f"the worker's process died: {detail.partition(' Some common causes include')[0]}"
