"""Groups of workers, nodes that come and go, requests to scale, and slow workers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from feeding import feed, fresh, nodes_of, progress, started, states

from dbtrain.orchestration.events import (
    Action,
    CapacityChanged,
    Event,
    KillWorker,
    ScaleRequested,
    StartWorker,
    StopRequested,
    StopWorker,
    Tick,
    WorkerDied,
    WorkerFinished,
    WorkerStopped,
)
from dbtrain.orchestration.state import BlockState, BlockStatus, CoordinatorState, Policy


def test_a_group_waits_for_room_and_holds_up_no_smaller_block() -> None:
    blocks = [BlockStatus(0), BlockStatus(1, replicas=2), BlockStatus(2)]
    state, actions = feed(fresh(blocks, slots=2), Tick(0.0))
    assert actions == [StartWorker(0, 1), StartWorker(2, 1)]
    state, actions = feed(state, WorkerFinished(1.0, 2, 1, 9))
    assert actions == []
    state, actions = feed(state, WorkerFinished(2.0, 0, 1, 9))
    assert actions == [StartWorker(1, 1, replicas=2)]
    assert state.live == 2


def test_a_group_counts_with_all_its_workers() -> None:
    blocks = [BlockStatus(0, replicas=2), BlockStatus(1)]
    state, actions = feed(fresh(blocks, slots=2), Tick(0.0))
    assert actions == [StartWorker(0, 1, replicas=2)]
    _, actions = feed(state, started(1.0, 0, 1), WorkerDied(2.0, 0, 1, "replica 1 was killed"))
    assert actions == [StartWorker(1, 1)]


@pytest.mark.parametrize(("room", "seats"), [(6, 6), (5, 3), (3, 3), (2, 2), (1, 1)])
def test_where_nodes_have_left_a_group_has_the_largest_part_that_divides_a_batch(room: int, seats: int) -> None:
    state, _ = feed(fresh([BlockStatus(0, replicas=6)], slots={"a": room, "b": 6}), CapacityChanged(0.0, ()))
    _, actions = feed(state, CapacityChanged(1.0, nodes_of({"a": room})))
    assert actions == [StartWorker(0, 1, replicas=seats)]


def small_group() -> CoordinatorState:
    """A block that is to have two workers and has one, since a node has left."""
    state, _ = feed(fresh([BlockStatus(0, replicas=2)], slots={"a": 1, "b": 1}), Tick(0.0), started(1.0, 0, 1, "b"))
    state, _ = feed(state, CapacityChanged(2.0, nodes_of({"a": 1})), WorkerDied(2.0, 0, 1, "the node is gone"))
    state, actions = feed(state, Tick(3.0), started(3.0, 0, 2, "a"))
    assert actions == [StartWorker(0, 2)]
    return state


def test_a_small_group_is_whole_again_when_a_node_joins() -> None:
    state, actions = feed(small_group(), Tick(4.0))
    assert actions == []
    state, actions = feed(state, CapacityChanged(5.0, nodes_of({"a": 1, "c": 1})), Tick(5.0), Tick(6.0))
    assert actions == [StopWorker(0, 2)]
    assert state.blocks[0].leaving == "there is room for 2 workers again"
    state, actions = feed(state, WorkerStopped(7.0, 0, 2, 12), started(8.0, 0, 3, "a"), Tick(8.0))
    assert actions == [StartWorker(0, 3, replicas=2)]
    assert state.blocks[0].failures == 0


def test_a_small_group_stays_small_while_others_train_in_its_room() -> None:
    blocks = [BlockStatus(0, replicas=2), BlockStatus(1)]
    state, _ = feed(fresh(blocks, slots={"a": 1, "b": 1}), CapacityChanged(0.0, nodes_of({"a": 1})), started(1.0, 0, 1))
    state, _ = feed(state, CapacityChanged(2.0, nodes_of({"a": 1, "b": 1})), started(2.0, 1, 1))
    assert [block.seats for block in state.blocks] == [1, 1]
    state, actions = feed(state, Tick(3.0))
    assert actions == []
    _, actions = feed(state, WorkerFinished(4.0, 1, 1, 9), Tick(4.0))
    assert actions == [StopWorker(0, 1)]


def test_a_block_that_waits_goes_before_a_group_that_would_grow() -> None:
    blocks = [BlockStatus(0, replicas=2), BlockStatus(1)]
    state, _ = feed(fresh(blocks, slots={"a": 1, "b": 1}), CapacityChanged(0.0, nodes_of({"a": 1})), started(1.0, 0, 1))
    _, actions = feed(state, CapacityChanged(2.0, nodes_of({"a": 1, "b": 1})), Tick(2.0))
    assert actions == [StartWorker(1, 1)]


def test_asking_a_small_group_for_what_it_should_have_makes_it_whole() -> None:
    state, _ = feed(small_group(), CapacityChanged(5.0, nodes_of({"a": 1, "c": 1})))
    _, actions = feed(state, ScaleRequested(5.5, 0, 2), WorkerStopped(6.0, 0, 2, 12))
    assert actions == [StopWorker(0, 2), StartWorker(0, 3, replicas=2)]


def test_asking_a_small_group_for_what_it_has_leaves_it_alone() -> None:
    state, actions = feed(small_group(), ScaleRequested(5.5, 0, 1), Tick(6.0))
    assert actions == []
    assert state.blocks[0].replicas == 1


def test_workers_on_nodes_that_have_left_are_given_up_by_their_own_events_alone() -> None:
    state, _ = feed(fresh(2, slots={"a": 1, "b": 1}), Tick(0.0), started(1.0, 0, 1, "a"), started(1.0, 1, 1, "b"))
    state, actions = feed(state, CapacityChanged(2.0, nodes_of({"a": 1})), Tick(2.0))
    assert actions == []
    assert states(state) == ["running", "running"]
    state, actions = feed(state, WorkerDied(3.0, 1, 1, "the node is gone", "b"), Tick(9.0))
    assert actions == []
    state, actions = feed(state, CapacityChanged(10.0, nodes_of({"a": 1, "c": 3})))
    assert actions == [StartWorker(1, 2)]


def test_without_any_node_everything_waits() -> None:
    state, actions = feed(fresh(2, slots=1), CapacityChanged(0.0, ()), Tick(1.0), Tick(1000.0))
    assert actions == []
    assert states(state) == ["pending", "pending"]


def test_of_the_blocks_that_wait_those_who_have_begun_and_lag_go_first() -> None:
    state, _ = feed(fresh(4, slots={"a": 3}), Tick(0.0), *(progress(1.0, b, 1, step=90 - 10 * b) for b in range(3)))
    state, _ = feed(
        state, CapacityChanged(2.0, ()), *(WorkerDied(2.0, block, 1, "the node is gone") for block in range(3))
    )
    _, actions = feed(state, Tick(9.0), CapacityChanged(10.0, nodes_of({"b": 4})))
    assert [action.block for action in actions] == [2, 1, 0, 3]


def test_a_limit_holds_however_many_workers_fit() -> None:
    state, actions = feed(fresh(4, slots={"a": 4, "b": 4}, limit=3), Tick(0.0))
    assert [action.block for action in actions] == [0, 1, 2]
    assert state.slots == 3


def test_replicas_that_could_be_anywhere_take_room_outside_an_avoided_node() -> None:
    # The group's first worker answers from a; the other one may be on b, where block 1 has to go.
    waiting = BlockStatus(1, state=BlockState.RESTARTING, retry_at=2.0)
    state, actions = feed(
        fresh([BlockStatus(0, replicas=2), waiting], slots={"a": 2, "b": 1}), Tick(0.0), started(1.0, 0, 1, "a")
    )
    assert actions == [StartWorker(0, 1, replicas=2)]
    state = state.put(replace(waiting, failed_on=("a", "a", "a")))
    state, actions = feed(state, Tick(2.0))
    assert actions == []
    state, actions = feed(state, WorkerFinished(3.0, 0, 1, 9))
    assert actions == [StartWorker(1, 1, avoid=frozenset({"a"}))]


def test_who_has_not_answered_when_a_node_leaves_is_asked_for_anew() -> None:
    state, _ = feed(fresh(2, slots={"a": 1, "b": 2}), Tick(0.0), started(1.0, 0, 1, "b"))
    state, actions = feed(state, CapacityChanged(2.0, nodes_of({"b": 2})))
    assert actions == [KillWorker(1, 1), StartWorker(1, 2)]
    assert [block.failures for block in state.blocks] == [0, 0]
    assert [block.restarts for block in state.blocks] == [0, 0]
    _, actions = feed(state, CapacityChanged(3.0, nodes_of({"b": 2, "c": 1})))
    assert actions == []  # one more is no reason


def scale(time: float, replicas: int) -> ScaleRequested:
    return ScaleRequested(time, 0, replicas)


def test_scaling_a_running_block_lets_it_save_and_start_with_the_new_number() -> None:
    state, _ = feed(fresh(2, slots=3), Tick(0.0), started(1.0, 0, 1), started(1.0, 1, 1))
    other = state.blocks[1]
    state, actions = feed(state, scale(2.0, 2), Tick(2.5))
    assert actions == [StopWorker(0, 1)]
    assert state.blocks[0].leaving == "it goes on with 2 workers"
    state, actions = feed(state, WorkerStopped(3.0, 0, 1, 17), started(4.0, 0, 2))
    assert actions == [StartWorker(0, 2, replicas=2)]
    state, actions = feed(state, scale(5.0, 1), WorkerStopped(6.0, 0, 2, 40))
    assert actions == [StopWorker(0, 2), StartWorker(0, 3)]
    assert (state.blocks[0].step, state.blocks[0].restarts, state.blocks[0].failures) == (40, 0, 0)
    assert state.blocks[1] is other


@pytest.mark.parametrize(
    ("before", "waits_as"),
    [
        ([], "pending"),
        ([WorkerDied(1.0, 0, 1, "x")], "restarting"),
        ([scale(1.0, 4), CapacityChanged(1.0, ()), WorkerStopped(2.0, 0, 1, 5)], "paused"),
    ],
)
def test_a_waiting_block_starts_with_the_newest_number(before: list[Event], waits_as: str) -> None:
    blocks = [BlockStatus(0), BlockStatus(1)]
    order = [1, 0] if waits_as == "pending" else [0, 1]
    state, _ = feed(fresh(blocks, slots=1, order=order), Tick(0.0), *before)
    assert states(state)[0] == waits_as
    state, actions = feed(state, scale(3.0, 2))
    assert actions == []
    attempt = state.blocks[0].attempt
    state, actions = feed(
        state, CapacityChanged(50.0, nodes_of({"n": 1, "m": 4})), WorkerFinished(51.0, 1, state.blocks[1].attempt, 9)
    )
    assert StartWorker(0, attempt + 1, replicas=2) in actions


def test_scaling_a_block_that_starts_asks_that_worker_to_leave_again() -> None:
    state, actions = feed(fresh(1, slots=2), Tick(0.0), scale(1.0, 2))
    assert actions == [StartWorker(0, 1), StopWorker(0, 1)]
    _, actions = feed(state, started(2.0, 0, 1), WorkerStopped(3.0, 0, 1, 0))
    assert actions == [StartWorker(0, 2, replicas=2)]


def test_scaling_a_block_that_leaves_asks_nobody_twice() -> None:
    state, _ = feed(fresh(1, slots=4), Tick(0.0), started(1.0, 0, 1), scale(2.0, 2))
    state, actions = feed(state, scale(3.0, 4))
    assert actions == []
    _, actions = feed(state, WorkerStopped(4.0, 0, 1, 9))
    assert actions == [StartWorker(0, 2, replicas=4)]


def test_a_block_that_dies_instead_of_leaving_counts_as_dead_and_is_scaled() -> None:
    state, _ = feed(fresh(1, slots=2), Tick(0.0), started(1.0, 0, 1), scale(2.0, 2), WorkerDied(3.0, 0, 1, "x"))
    assert states(state) == ["restarting"]
    state, actions = feed(state, Tick(4.0))
    assert actions == [StartWorker(0, 2, replicas=2)]
    assert state.blocks[0].failures == 1


@pytest.mark.parametrize(
    ("event", "end"),
    [
        (WorkerFinished(1.0, 0, 1, 9), "finished"),
        (StopRequested(1.0), "stopped"),
    ],
)
def test_an_ended_block_is_not_scaled(event: Event, end: str) -> None:
    state, _ = feed(fresh(1, slots=2), Tick(0.0), event, WorkerStopped(1.5, 0, 1, 9))
    assert states(state) == [end]
    assert feed(state, scale(2.0, 2)) == (state, [])


def test_the_number_it_has_changes_nothing() -> None:
    state, _ = feed(fresh(1, slots=2), Tick(0.0), started(1.0, 0, 1))
    assert feed(state, scale(2.0, 1)) == (state, [])


def test_a_stop_goes_before_a_scaling_under_way() -> None:
    state, _ = feed(fresh(1, slots=2), Tick(0.0), started(1.0, 0, 1), scale(2.0, 2))
    state, actions = feed(state, StopRequested(3.0), scale(3.5, 4), WorkerStopped(4.0, 0, 1, 9), Tick(9.0))
    assert actions == [StopWorker(0, 1)]
    assert states(state) == ["stopped"]


MOVING = Policy(move_slow=True)


def all_running(slots: int = 2, policy: Policy = MOVING, others: int = 2, **of_block_0: float) -> CoordinatorState:
    """Block 0 on node a, and the others on node b."""
    blocks = [BlockStatus(0, **of_block_0), *(BlockStatus(1 + other) for other in range(others))]  # type: ignore[arg-type]
    state, _ = feed(fresh(blocks, slots={"a": slots, "b": slots + others - 1}, policy=policy), Tick(0.0))
    return feed(state, *(started(0.0, block, 1, "b" if block else "a") for block in range(len(blocks))))[0]


def weighed(
    state: CoordinatorState, speed: float, checks: int, start: float = 0.0
) -> tuple[CoordinatorState, list[Action]]:
    """Block 0 tells `speed` samples a second and the others 100, until they have been compared some times."""
    actions: list[Action] = []
    for check in range(1, checks + 1):
        time = start + 5.0 * check
        events = [
            progress(time, block, state.blocks[block].attempt, int(time), speed=speed if block == 0 else 100.0)
            for block in range(len(state.blocks))
            if state.blocks[block].state is BlockState.RUNNING
        ]
        state, new = feed(state, *events, Tick(time))
        actions += new
    return state, actions


def test_a_slow_worker_is_told_of_at_the_third_comparison_in_a_row() -> None:
    state, actions = weighed(all_running(policy=Policy()), speed=33.0, checks=2)
    assert state.blocks[0].slow is None
    state, more = weighed(state, speed=33.0, checks=1, start=10.0)
    assert state.blocks[0].slow == "takes 3.0 times as long for a layer as the median worker"
    assert actions + more == []  # told of; moving it is not asked for
    state, _ = weighed(state, speed=99.0, checks=1, start=15.0)
    assert state.blocks[0].slow is None


def test_comparisons_that_find_it_well_in_between_start_the_count_again() -> None:
    state, _ = weighed(all_running(), speed=20.0, checks=2)
    state, _ = weighed(state, speed=100.0, checks=1, start=10.0)
    state, _ = weighed(state, speed=20.0, checks=2, start=15.0)
    assert state.blocks[0].slow is None


def test_a_little_slow_is_not_slow() -> None:
    state, _ = weighed(all_running(), speed=34.0, checks=9)
    assert state.blocks[0].slow is None


def test_ticks_between_two_comparisons_do_not_count() -> None:
    state, _ = weighed(all_running(), speed=20.0, checks=1)
    state, _ = feed(state, *(Tick(5.0 + part / 10) for part in range(49)))
    assert state.blocks[0].slow_checks == 1


def test_blocks_of_more_layers_may_take_longer() -> None:
    state, _ = weighed(all_running(cost=4.0), speed=25.0, checks=5)
    assert state.blocks[0].slow is None


def test_a_group_is_measured_by_the_worker() -> None:
    state, _ = weighed(all_running(replicas=2), speed=66.0, checks=3)
    assert state.blocks[0].slow is not None


def test_two_workers_are_never_compared() -> None:
    state, _ = feed(all_running(), WorkerFinished(1.0, 2, 1, 99))
    state, _ = weighed(state, speed=1.0, checks=9)
    assert state.blocks[0].slow is None


def test_a_slow_worker_is_moved_to_another_node_once() -> None:
    state, actions = weighed(all_running(), speed=20.0, checks=3)
    assert actions == [StopWorker(0, 1)]
    assert state.blocks[0].leaving == "it is slow here"
    state, actions = feed(state, WorkerStopped(16.0, 0, 1, 16), started(17.0, 0, 2, "b"))
    assert actions == [StartWorker(0, 2, avoid=frozenset({"a"}))]
    state, actions = weighed(state, speed=20.0, checks=9, start=20.0)
    assert actions == []  # it is slow wherever it is
    assert state.blocks[0].slow is not None


def test_it_stays_where_it_is_while_there_is_room_nowhere_else() -> None:
    state, actions = weighed(all_running(slots=1), speed=20.0, checks=9)
    assert actions == []
    assert state.blocks[0].slow is not None
    state, _ = feed(state, CapacityChanged(46.0, nodes_of({"a": 1, "b": 2, "c": 1})))
    state, actions = weighed(state, speed=20.0, checks=1, start=46.0)
    assert actions == [StopWorker(0, 1)]


def test_a_slow_worker_that_leaves_for_another_reason_is_not_asked_again() -> None:
    state, _ = weighed(all_running(slots=1, others=3), speed=20.0, checks=3)
    assert state.blocks[0].slow is not None
    state, actions = feed(state, scale(16.0, 2), CapacityChanged(16.0, nodes_of({"a": 1, "b": 5})))
    assert actions == [StopWorker(0, 1)]
    state, actions = weighed(state, speed=20.0, checks=3, start=16.0)
    assert actions == []
    assert state.blocks[0].leaving == "it goes on with 2 workers"


def test_a_run_that_stops_moves_nobody() -> None:
    state, _ = weighed(all_running(), speed=20.0, checks=2)
    state, _ = feed(state, StopRequested(11.0))
    _, actions = weighed(state, speed=20.0, checks=3, start=11.0)
    assert actions == []
