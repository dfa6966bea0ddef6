"""A short `make chaos`, and what its checks would find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from chaos import run_chaos, summary
from chaos_checks import Fault, Resumption, judge, late_lines, resumptions, verdict

EVERY = 100


def fault(number: int = 1, **changes: object) -> Fault:
    return replace(Fault(number, "kill worker", 0, 5.0, {0: 1}, {0: 250}, {0: 200}), **changes)  # type: ignore[arg-type]


def back(highest: int, resumed: int) -> Resumption:
    return Resumption(block=0, before=1, attempt=2, highest=highest, resumed=resumed, time=9.0)


def test_resumptions_are_read_off_the_metrics_and_late_lines_begin_nothing() -> None:
    lines = [(1.0, 1, 1), (2.0, 1, 2), (3.0, 1, 3), (8.0, 3, 2), (8.1, 1, 4), (8.2, 3, 3)]
    assert resumptions(2, lines) == [Resumption(2, before=1, attempt=3, highest=3, resumed=1, time=8.0)]
    assert resumptions(2, lines)[0].lost == 2
    assert late_lines(lines) == 1


def test_a_step_that_a_later_attempt_had_not_reached_again_is_not_lost_twice() -> None:
    lines = [(1.0, 1, 150), (2.0, 2, 101), (3.0, 2, 110), (4.0, 3, 111)]
    assert [found.lost for found in resumptions(0, lines)] == [50, 0]


@pytest.mark.parametrize(
    ("highest", "resumed", "faults", "problem", "in_flight"),
    [
        (250, 200, [fault()], None, False),
        (300, 200, [fault()], None, False),
        (310, 200, [fault()], None, True),
        (401, 200, [fault()], "lost 201 steps", False),
        (250, 100, [fault()], "went back behind the intact checkpoint of step 200", False),
        (250, 100, [fault(damaged=1, durable={0: 100})], None, False),
        (250, 100, [fault(durable={0: 100})], None, True),
        (250, 250, [fault(graceful=True)], None, False),
        (250, 249, [fault(graceful=True, durable={})], "was asked to save, and lost steps", False),
        (250, 200, [fault(graceful=True), fault(2)], None, False),
        (250, 249, [fault(attempts={1: 1})], "no fault hit this block", False),
        (250, 249, [fault(attempts={0: 2})], "no fault hit this block", False),
        (250, 249, [], "no fault hit this block", False),
    ],
)
def test_what_a_fault_may_cost(
    highest: int, resumed: int, faults: list[Fault], problem: str | None, in_flight: bool
) -> None:
    found = judge(back(highest, resumed), faults, EVERY)
    assert (found.problem, found.in_flight) == (problem, in_flight)


def test_a_wrong_digest_and_too_few_faults_are_problems() -> None:
    steps = [[(1.0, 1, 250), (9.0, 2, 201)], [(1.0, 1, 1)]]
    assert verdict([fault()], steps, EVERY, 1, "a", "a").problems == ()
    problems = verdict([fault()], steps, EVERY, 2, "a", "b").problems
    assert [problem.split(" ")[:3] for problem in problems] == [["the", "run", "was"], ["the", "digest", "is"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_in_many_ways_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    kinds = ["kill_worker", "freeze_worker", "kill_node", "kill_driver", "damage_checkpoint", "stop_driver"]
    facts = run_chaos(
        tmp_path, seed=5, kinds=kinds, count=len(kinds), steps=2500, every=EVERY, seconds=400.0, say=print
    )
    print(summary(facts))
    assert facts["problems"] == []
