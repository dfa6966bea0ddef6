from __future__ import annotations

import pytest
from feeding import POLICY, feed, fresh, started, states

from dbtrain.orchestration.coordinator import step
from dbtrain.orchestration.events import (
    Event,
    KillWorker,
    Node,
    StartWorker,
    StopRequested,
    StopWorker,
    Tick,
    WorkerAlive,
    WorkerDied,
    WorkerError,
    WorkerFinished,
    WorkerProgress,
    WorkerStopped,
)
from dbtrain.orchestration.state import BlockState, BlockStatus, Policy, initial_state


def test_fills_slots_in_order_and_gives_a_free_one_to_the_next() -> None:
    state, actions = feed(fresh(3, slots=2, order=[2, 0, 1]), Tick(0.0))
    assert actions == [StartWorker(2, 1), StartWorker(0, 1)]
    state, actions = feed(state, started(1.0, 2, 1), WorkerFinished(2.0, 2, 1, step=9))
    assert actions == [StartWorker(1, 1)]
    assert states(state) == ["starting", "starting", "finished"]
    assert state.blocks[2].step == 9


def test_a_death_restarts_that_block_alone_after_its_backoff() -> None:
    state, _ = feed(fresh(2, slots=2), Tick(0.0), started(1.0, 0, 1), started(1.0, 1, 1))
    other = state.blocks[1]
    state, actions = feed(state, WorkerDied(2.0, 0, 1, "killed"), Tick(2.4))
    assert actions == []
    assert state.blocks[0].state is BlockState.RESTARTING
    assert state.blocks[0].pid is None
    state, actions = feed(state, Tick(2.5))
    assert actions == [StartWorker(0, 2)]
    assert state.blocks[0].restarts == 1
    assert state.blocks[1] is other


def test_backoff_doubles_up_to_its_cap() -> None:
    waits = [POLICY.backoff(restarts) for restarts in (0, 1, 2, 5, 6, 7, 10_000)]
    assert waits == [0.5, 1.0, 2.0, 16.0, 30.0, 30.0, 30.0]


def test_a_spent_budget_fails_the_block_with_its_reason_and_frees_the_slot() -> None:
    state, _ = feed(fresh(2, slots=1, policy=Policy(max_restarts=1)), Tick(0.0))
    state, actions = feed(state, WorkerDied(1.0, 0, 1, "killed"))
    assert actions == [StartWorker(1, 1)]  # the slot is not idle during the back-off
    state, actions = feed(state, WorkerFinished(2.0, 1, 1, step=5))
    assert actions == [StartWorker(0, 2)]
    state, actions = feed(state, WorkerDied(3.0, 0, 2, "killed again"))
    assert actions == []
    assert states(state) == ["failed", "finished"]
    assert state.blocks[0].reason == "killed again (after 1 restart without a new checkpoint)"
    assert state.done


def test_no_restarts_allowed() -> None:
    state, _ = feed(fresh(1, slots=1, policy=Policy(max_restarts=0)), Tick(0.0), WorkerDied(1.0, 0, 1, "x"))
    assert states(state) == ["failed"]


def error(time: float, attempt: int, at: int) -> WorkerError:
    return WorkerError(time, 0, attempt, f"error at {at}", at, "Traceback ...")


def test_an_error_is_retried_once_and_fails_when_it_repeats_at_the_same_step() -> None:
    state, actions = feed(fresh(1, slots=1), Tick(0.0), error(1.0, 1, 7), Tick(2.0), error(3.0, 2, 7))
    assert actions == [StartWorker(0, 1), StartWorker(0, 2)]
    assert states(state) == ["failed"]
    assert state.blocks[0].reason == "error at 7"


def test_errors_at_different_steps_are_retried_within_the_budget() -> None:
    state, _ = feed(fresh(1, slots=1), Tick(0.0))
    for attempt, at in ((1, 7), (2, 9), (3, 11)):
        state, _ = feed(state, error(100.0 * attempt, attempt, at), Tick(100.0 * attempt + 50))
        assert states(state) == ["starting"]
    state, _ = feed(state, error(400.0, 4, 13))
    assert states(state) == ["failed"]


def test_a_death_between_two_errors_does_not_hide_that_they_are_the_same() -> None:
    state, _ = feed(fresh(1, slots=1), Tick(0.0), error(1.0, 1, 7), Tick(50.0), WorkerDied(51.0, 0, 2, "x"), Tick(99.0))
    state, _ = feed(state, error(100.0, 3, 7))
    assert states(state) == ["failed"]


def test_errors_before_the_block_is_built_count_as_the_same_step() -> None:
    state, _ = feed(fresh(1, slots=1), Tick(0.0), error(1.0, 1, -1), Tick(9.0), error(10.0, 2, -1))
    assert states(state) == ["failed"]


def test_a_worker_that_does_not_start_is_killed_and_counts_as_dead() -> None:
    state, _ = feed(fresh(1, slots=1), Tick(0.0))
    state, actions = feed(state, Tick(9.9))
    assert actions == []
    state, actions = feed(state, Tick(10.0))
    assert actions == [KillWorker(0, 1)]
    assert state.blocks[0].reason == "the worker did not start within 10 s"
    state, actions = feed(state, started(10.1, 0, 1))  # it wakes up after all
    assert states(state) == ["restarting"]
    assert actions == []
    state, actions = feed(state, Tick(10.5))
    assert actions == [StartWorker(0, 2)]


def test_a_running_worker_that_answers_may_take_its_time() -> None:
    state, actions = feed(fresh(1, slots=1), Tick(0.0), started(1.0, 0, 1))
    for time in range(50, 1800, 50):
        state, more = feed(state, WorkerAlive(float(time), 0, 1), Tick(float(time)))
        assert more == []
    assert states(state) == ["running"]
    assert actions == [StartWorker(0, 1)]


@pytest.mark.parametrize(
    "stale",
    [
        started(5.0, 0, 1),
        WorkerProgress(5.0, 0, 1, 99, 0.1, 5.0, 90),
        WorkerFinished(5.0, 0, 1, 100),
        WorkerStopped(5.0, 0, 1, 99),
        WorkerDied(5.0, 0, 1, "late news"),
        WorkerError(5.0, 0, 1, "late news", 3, "Traceback"),
    ],
)
def test_events_of_an_older_attempt_change_nothing(stale: Event) -> None:
    state, _ = feed(fresh(1, slots=1), Tick(0.0), WorkerDied(1.0, 0, 1, "x"), Tick(2.0))
    assert state.blocks[0].attempt == 2
    assert step(state, stale) == (state, ())


def test_progress_is_kept_and_asks_for_nothing() -> None:
    state, _ = feed(fresh(2, slots=1), Tick(0.0), started(1.0, 0, 1))
    state, actions = feed(state, WorkerProgress(2.0, 0, 1, 30, 0.25, 640.0, 20))
    block = state.blocks[0]
    assert (block.step, block.loss, block.samples_per_second, block.checkpoint_step) == (30, 0.25, 640.0, 20)
    assert actions == []


def test_stop_asks_the_live_and_stops_the_waiting() -> None:
    state, _ = feed(fresh(4, slots=3), Tick(0.0), started(1.0, 0, 1), WorkerDied(1.0, 2, 1, "x"))
    state, actions = feed(state, StopRequested(1.1))
    assert actions == [StopWorker(0, 1), StopWorker(1, 1), StopWorker(3, 1)]
    assert states(state) == ["running", "starting", "stopped", "starting"]
    state, actions = feed(
        state,
        WorkerStopped(2.0, 0, 1, step=4),
        WorkerDied(2.0, 1, 1, "died while stopping"),
        WorkerFinished(2.0, 3, 1, step=10),
        Tick(100.0),
    )
    assert actions == []
    assert states(state) == ["stopped", "stopped", "stopped", "finished"]
    assert state.done


def test_a_second_stop_request_asks_nobody_again() -> None:
    state, _ = feed(fresh(1, slots=1), Tick(0.0), StopRequested(1.0))
    assert step(state, StopRequested(2.0)) == (state, ())


def test_a_worker_that_never_answers_does_not_hold_up_a_stop() -> None:
    state, actions = feed(fresh(1, slots=1), Tick(0.0), StopRequested(1.0), Tick(10.0))
    assert actions == [StartWorker(0, 1), StopWorker(0, 1), KillWorker(0, 1)]
    assert states(state) == ["stopped"]


def test_a_worker_that_left_unasked_is_restarted() -> None:
    state, _ = feed(fresh(1, slots=1), Tick(0.0), WorkerStopped(1.0, 0, 1, step=3))
    assert states(state) == ["restarting"]


def test_resumed_blocks_keep_counting_attempts_and_finished_ones_stay() -> None:
    found = [
        BlockStatus(0, state=BlockState.FINISHED, attempt=2, step=9),
        BlockStatus(1, attempt=4, step=5),
    ]
    state, actions = feed(initial_state(found, nodes=[Node("n", 2)], policy=POLICY), Tick(0.0))
    assert actions == [StartWorker(1, 5)]
    assert state.blocks[1].restarts == 0


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2], [0, 1, 2]])
def test_an_order_that_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="order"):
        fresh(2, slots=1, order=order)
