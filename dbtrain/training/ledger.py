"""Who takes part in which averaging of stems: a small record that all blocks change by compare-and-swap.

Meetings have the numbers 0, 1, 2, ... and one is open at a time. A block that has something to average arrives at the
open one. Whoever sees first that all have come for whom it waits, or has waited long enough, closes it: that decides
who takes part, and opens the next. The record is a value, and a transition is a function of it; nothing here talks to
anybody.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

Member = tuple[int, int]
"""A block and the number of the attempt that trains it: a worker that was restarted is another member."""


@dataclass(frozen=True)
class Arrival:
    """What a member says on arriving."""

    attempt: int
    group: int | None
    """The process group it holds; None where it holds none, as after an averaging that failed."""
    returns: bool
    """Whether it will come to a meeting after this one."""


@dataclass(frozen=True)
class Decision:
    """How a meeting was closed."""

    members: tuple[Member, ...]
    """Who takes part, in order of blocks; a member's place in here is its rank."""
    returning: tuple[Member, ...]
    """Those of them who will come again."""
    group: int
    """The process group in which they talk: one that all of them hold, or a new one, named after the meeting."""


@dataclass(frozen=True)
class Ledger:
    """The open meeting, and how the one before it was closed."""

    meeting: int
    """Number of the open one."""
    arrived: Mapping[int, Arrival]
    """By block."""
    decision: Decision | None
    """Of meeting `meeting` - 1."""

    def with_arrival(self, block: int, arrival: Arrival) -> Ledger:
        """The block has come."""
        return replace(self, arrived={**self.arrived, block: arrival})

    def without(self, block: int) -> Ledger:
        """The block has left before the end."""
        return replace(self, arrived={who: arrival for who, arrival in self.arrived.items() if who != block})

    def complete(self, live: Mapping[int, int]) -> bool:
        """Whether all are there for whom the meeting waits.

        These are the members of the last meeting that said they would return and still live; at the first meeting,
        all who live. So a block that has missed a meeting is not waited for until it has come to one again.

        Args:
            live: the attempt of each block that has a worker.
        """
        awaited = live.items() if self.decision is None else self.decision.returning
        return all(
            live.get(block) != attempt or (block in self.arrived and self.arrived[block].attempt == attempt)
            for block, attempt in awaited
        )

    def closed(self, live: Mapping[int, int]) -> Ledger:
        """Those who have come and live take part; the next meeting is open."""
        present = {block: a for block, a in sorted(self.arrived.items()) if live.get(block) == a.attempt}
        members = tuple((block, arrival.attempt) for block, arrival in present.items())
        returning = tuple((block, arrival.attempt) for block, arrival in present.items() if arrival.returns)
        group, before = self.meeting, self.decision
        # After a failure some may still hold the group and others not: then all of them begin anew.
        if before is not None and before.members == members:
            kept = all(arrival.group == before.group for arrival in present.values())
            group = before.group if kept else self.meeting
        return Ledger(self.meeting + 1, {}, Decision(members, returning, group))

    def to_json(self) -> str:
        """One line; equal ledgers with arrivals in the same order have equal lines."""
        decision = self.decision
        return json.dumps(
            {
                "meeting": self.meeting,
                "arrived": [[block, a.attempt, a.group, a.returns] for block, a in self.arrived.items()],
                "decision": None if decision is None else [decision.members, decision.returning, decision.group],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Ledger:
        """Reads what `to_json` wrote."""
        raw = json.loads(text)
        decision = None
        if raw["decision"] is not None:
            members, returning, group = raw["decision"]
            decision = Decision(_members(members), _members(returning), group)
        arrived = {block: Arrival(attempt, group, returns) for block, attempt, group, returns in raw["arrived"]}
        return cls(raw["meeting"], arrived, decision)


def _members(raw: list[list[int]]) -> tuple[Member, ...]:
    return tuple((block, attempt) for block, attempt in raw)


NO_MEETING_YET = Ledger(0, {}, None)
"""How a run begins."""
