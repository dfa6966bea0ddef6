"""Time slices: blocks that take turns while there is not room for all."""

from __future__ import annotations

import pytest
from feeding import feed, fresh, nodes_of, progress, started, states

from dbtrain.orchestration.events import (
    Action,
    CapacityChanged,
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

TURNS = Policy(max_restarts=3, first_backoff=0.5, slice_steps=10)


def until(actions: list[Action]) -> dict[int, int | None]:
    """The ends of the slices that start."""
    return {action.block: action.until for action in actions if isinstance(action, StartWorker)}


def test_blocks_take_turns_and_those_who_lag_go_first() -> None:
    state, actions = feed(fresh(3, slots=1, policy=TURNS), Tick(0.0))
    turns = []
    for turn in range(6):
        (block, end) = next(iter(until(actions).items()))
        turns.append((block, end))
        assert end is not None
        state, actions = feed(state, started(turn, block, state.blocks[block].attempt))
        state, actions = feed(state, WorkerStopped(turn, block, state.blocks[block].attempt, end))
    assert turns == [(0, 10), (1, 10), (2, 10), (0, 20), (1, 20), (2, 20)]
    assert [block.restarts for block in state.blocks] == [0, 0, 0]


@pytest.mark.parametrize(("step", "end"), [(0, 10), (9, 10), (10, 20), (17, 20)])
def test_slices_end_at_multiples(step: int, end: int) -> None:
    _, actions = feed(fresh([BlockStatus(0, step=step), BlockStatus(1, step=50)], slots=1, policy=TURNS), Tick(0.0))
    assert until(actions) == {0: end}


def test_there_are_no_slices_while_all_fit() -> None:
    _, actions = feed(fresh(3, slots=3, policy=TURNS), Tick(0.0))
    assert until(actions) == {0: None, 1: None, 2: None}


def test_there_are_no_slices_once_all_that_is_left_fits() -> None:
    state, _ = feed(fresh(2, slots=1, policy=TURNS), Tick(0.0), WorkerStopped(1.0, 0, 1, 10))
    state, actions = feed(state, WorkerFinished(2.0, 1, 1, 10))
    assert until(actions) == {0: None}


def test_a_worker_that_leaves_before_its_slice_ends_was_stopped_by_someone_else() -> None:
    state, _ = feed(fresh(2, slots=1, policy=TURNS), Tick(0.0), WorkerStopped(1.0, 0, 1, 9))
    assert states(state) == ["restarting", "starting"]


def test_a_death_within_a_slice_goes_on_to_the_same_end() -> None:
    state, _ = feed(fresh(2, slots=1, policy=TURNS), Tick(0.0), progress(1.0, 0, 1, step=7, checkpoint=5))
    state, _ = feed(state, WorkerDied(1.0, 0, 1, "x"), WorkerStopped(2.0, 1, 1, 10))
    _, actions = feed(state, Tick(9.0))
    assert until(actions) == {}  # block 0 has got its room back by then
    assert (state.blocks[0].state, state.blocks[0].until) == (BlockState.STARTING, 10)


def test_a_group_gets_its_turn_though_single_workers_would_fill_every_gap() -> None:
    blocks = [BlockStatus(0), BlockStatus(1), BlockStatus(2, replicas=2)]
    state, actions = feed(fresh(blocks, slots=2, policy=TURNS), Tick(0.0))
    assert until(actions) == {0: 10, 1: 10}
    state, actions = feed(state, WorkerStopped(1.0, 0, 1, 10))
    assert actions == []  # block 0 would be faster, and block 2 never have two workers
    state, actions = feed(state, WorkerStopped(2.0, 1, 1, 10))
    assert actions == [StartWorker(2, 1, replicas=2, until=10)]


def test_workers_without_a_slice_make_way_when_a_node_leaves() -> None:
    state, _ = feed(fresh(2, slots={"a": 1, "b": 1}, policy=TURNS), Tick(0.0), started(0.0, 0, 1, "a"))
    state, _ = feed(state, started(0.0, 1, 1, "b"), CapacityChanged(1.0, nodes_of({"a": 1})))
    state, _ = feed(state, progress(1.0, 0, 1, 104), progress(1.0, 1, 1, 95), WorkerDied(1.0, 1, 1, "the node is gone"))
    state, actions = feed(state, Tick(9.0))
    assert actions == []  # the lag is less than a slice
    state, actions = feed(state, progress(10.0, 0, 1, 105), Tick(10.0), Tick(11.0))
    assert actions == [StopWorker(0, 1)]
    assert state.blocks[0].leaving == "others have waited for a time slice"
    state, actions = feed(state, WorkerStopped(12.0, 0, 1, 106))
    assert actions == [StartWorker(1, 2, until=100)]


def test_no_more_make_way_than_there_are_who_wait() -> None:
    policy = Policy(slice_steps=10)
    state, _ = feed(fresh(4, slots={"a": 3, "b": 1}, policy=policy), Tick(0.0))
    state, _ = feed(state, *(started(0.0, block, 1, "b" if block == 3 else "a") for block in range(4)))
    state, _ = feed(
        state, *(progress(1.0, block, 1, 50 + block) for block in range(3)), WorkerDied(1.0, 3, 1, "x", "b")
    )
    state, actions = feed(state, CapacityChanged(1.0, nodes_of({"a": 3})), Tick(9.0), Tick(9.5))
    assert actions == [StopWorker(2, 1)]  # the one that is furthest


def test_without_slices_nobody_makes_way() -> None:
    state, _ = feed(fresh(2, slots=2), Tick(0.0), started(0.0, 0, 1), started(0.0, 1, 1), progress(1.0, 0, 1, 500))
    state, _ = feed(state, CapacityChanged(1.0, nodes_of({"n": 1})), WorkerDied(1.0, 1, 1, "x"))
    _, actions = feed(state, Tick(9.0))
    assert actions == []


def test_room_on_a_node_that_is_avoided_is_no_room_for_all() -> None:
    blocks = [BlockStatus(0, failed_on=("a", "a")), BlockStatus(1)]
    _, actions = feed(fresh(blocks, slots={"a": 1, "b": 1}, policy=TURNS), Tick(0.0))
    assert actions == [StartWorker(0, 1, until=10, avoid=frozenset({"a"})), StartWorker(1, 1, until=10)]


def play(state: CoordinatorState, lengths: dict[int, int]) -> int:
    """Let all workers train at the same speed to their ends; the largest lag of one unfinished block behind another."""
    live: dict[int, StartWorker] = {}
    at = dict.fromkeys(lengths, 0)
    largest = 0
    time = 0.0
    state, actions = feed(state, Tick(time))
    while not state.done:
        for action in actions:
            assert not isinstance(action, KillWorker)
            if isinstance(action, StartWorker):
                live[action.block] = action
                state, _ = feed(state, started(time, action.block, action.attempt))
        actions = []
        time += 1.0
        for block, order in sorted(live.items()):
            at[block] += 1
            if at[block] == lengths[block]:
                event: WorkerFinished | WorkerStopped = WorkerFinished(time, block, order.attempt, at[block])
            elif at[block] == order.until:
                event = WorkerStopped(time, block, order.attempt, at[block])
            else:
                state, _ = feed(state, progress(time, block, order.attempt, at[block]))
                continue
            del live[block]
            state, new = feed(state, event)
            actions += new
        unfinished = [at[block] for block in at if at[block] < lengths[block]]
        largest = max(largest, max(unfinished, default=0) - min(unfinished, default=0))
        assert time < 10_000, "somebody starves"
    return largest


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("large", [{}, {0: 2}, {3: 2, 6: 2}])
def test_no_block_lags_more_than_two_slices(slots: int, large: dict[int, int]) -> None:
    blocks = [BlockStatus(index, replicas=large.get(index, 1)) for index in range(8)]
    assert play(fresh(blocks, slots=slots, policy=TURNS), dict.fromkeys(range(8), 100)) <= 20


def test_a_stop_and_a_scaling_end_a_slice() -> None:
    state, _ = feed(fresh(2, slots=1, policy=TURNS), Tick(0.0), started(0.0, 0, 1), ScaleRequested(1.0, 0, 2))
    state, actions = feed(state, WorkerStopped(2.0, 0, 1, 3))
    assert until(actions) == {1: 10}
    assert states(state) == ["paused", "starting"]
    state, actions = feed(state, StopRequested(3.0), WorkerStopped(4.0, 1, 1, 0))
    assert actions == [StopWorker(1, 1)]
    assert states(state) == ["stopped", "stopped"]
