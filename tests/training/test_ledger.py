"""Who takes part in which meeting, without anybody talking."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from dbtrain.training.ledger import NO_MEETING_YET, Arrival, Ledger

FIRST = {0: 1, 1: 1, 2: 1}
"""Three blocks at their first attempts."""


def _arrive(ledger: Ledger, attempts: Mapping[int, int], group: int | None = None, returns: bool = True) -> Ledger:
    for block, attempt in attempts.items():
        ledger = ledger.with_arrival(block, Arrival(attempt, group, returns))
    return ledger


def _members(ledger: Ledger) -> tuple[tuple[int, int], ...]:
    assert ledger.decision is not None
    return ledger.decision.members


def test_the_first_meeting_waits_for_all_who_live() -> None:
    two = _arrive(NO_MEETING_YET, {2: 1, 0: 1})
    assert not two.complete(FIRST)
    assert two.complete({0: 1, 2: 1})
    assert _arrive(two, {1: 1}).complete(FIRST)


def test_ranks_follow_the_blocks_whoever_came_first() -> None:
    ledger = _arrive(NO_MEETING_YET, {2: 1, 0: 1, 1: 1}).closed(FIRST)
    assert (ledger.meeting, dict(ledger.arrived), _members(ledger)) == (1, {}, ((0, 1), (1, 1), (2, 1)))


def test_who_was_missing_is_not_waited_for_until_it_has_come_again() -> None:
    ledger = _arrive(NO_MEETING_YET, {0: 1, 1: 1}).closed(FIRST)  # block 2 hangs, and still counts as alive
    ledger = _arrive(ledger, {0: 1, 1: 1})
    assert ledger.complete(FIRST)
    ledger = _arrive(ledger, {2: 1}).closed(FIRST)
    assert _members(ledger) == ((0, 1), (1, 1), (2, 1))
    assert not _arrive(ledger, {0: 1, 1: 1}).complete(FIRST)


@pytest.mark.parametrize("live", [{0: 1, 1: 1}, {0: 1, 1: 1, 2: 2}], ids=["dead", "restarted"])
def test_the_dead_are_neither_waited_for_nor_counted(live: dict[int, int]) -> None:
    ledger = _arrive(NO_MEETING_YET, FIRST).closed(FIRST)
    ledger = _arrive(ledger, {0: 1, 2: 1})  # and then block 2 dies
    assert not ledger.complete(live)
    ledger = _arrive(ledger, {1: 1})
    assert ledger.complete(live)
    assert _members(ledger.closed(live)) == ((0, 1), (1, 1))


def test_who_said_that_it_would_not_return_is_not_waited_for() -> None:
    ledger = _arrive(_arrive(NO_MEETING_YET, {0: 1, 1: 1}), {2: 1}, returns=False).closed(FIRST)
    assert len(_members(ledger)) == 3
    assert _arrive(ledger, {0: 1, 1: 1}).complete(FIRST)


def test_who_leaves_before_the_end_is_no_member() -> None:
    ledger = _arrive(NO_MEETING_YET, FIRST).without(1)
    assert _members(ledger.closed(FIRST)) == ((0, 1), (2, 1))


def test_a_group_is_kept_as_long_as_all_hold_it() -> None:
    def group(ledger: Ledger) -> int:
        assert ledger.decision is not None
        return ledger.decision.group

    ledger = _arrive(NO_MEETING_YET, FIRST).closed(FIRST)
    assert group(ledger) == 0
    ledger = _arrive(ledger, FIRST, group=0).closed(FIRST)
    assert group(ledger) == 0
    ledger = _arrive(_arrive(ledger, {0: 1, 1: 1}, group=0), {2: 1}, group=None).closed(FIRST)  # it failed for one
    assert group(ledger) == 2
    restarted = {**FIRST, 2: 2}
    ledger = _arrive(_arrive(ledger, {0: 1, 1: 1}, group=2), {2: 2}).closed(restarted)
    assert group(ledger) == 3
    ledger = _arrive(ledger, {0: 1, 1: 1}, group=3).closed({0: 1, 1: 1})
    assert group(ledger) == 4


def test_json_gives_back_an_equal_ledger() -> None:
    chance, ledger = random.Random(1), NO_MEETING_YET
    for _ in range(50):
        assert Ledger.from_json(ledger.to_json()) == ledger
        for block in chance.sample(range(4), 3):
            ledger = ledger.with_arrival(block, Arrival(chance.randrange(3), None, chance.random() < 0.5))
            assert Ledger.from_json(ledger.to_json().encode()) == ledger
        ledger = ledger.closed(dict.fromkeys(range(4), 1))
