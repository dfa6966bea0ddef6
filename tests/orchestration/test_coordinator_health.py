"""What the coordinator makes of workers that hang, of nodes that fail, and of budgets."""

from __future__ import annotations

import pytest
from feeding import POLICY, feed, fresh, nodes_of, progress, started, states

from dbtrain.orchestration.events import (
    CapacityChanged,
    KillWorker,
    StartWorker,
    StopRequested,
    Tick,
    WorkerAlive,
    WorkerDied,
    WorkerError,
    WorkerFinished,
    WorkerStopped,
)
from dbtrain.orchestration.state import BlockState, BlockStatus, CoordinatorState, Policy

TWO_NODES = {"a": 1, "b": 1}


def running(policy: Policy = POLICY) -> CoordinatorState:
    """One block whose worker answered at time 0."""
    return feed(fresh(1, slots=1, policy=policy), Tick(0.0), started(0.0, 0, 1))[0]


def test_a_worker_that_does_not_answer_is_killed_at_the_time_out_and_not_before() -> None:
    state, actions = feed(running(), WorkerAlive(7.0, 0, 1), Tick(66.9))
    assert actions == []
    state, actions = feed(state, Tick(67.0))
    assert actions == [KillWorker(0, 1)]
    assert state.blocks[0].reason == "the worker hangs: no answer for 60 s"
    assert state.blocks[0].failed_on == ("n",)
    state, actions = feed(state, progress(67.1, 0, 1, step=3), Tick(67.5))  # it wakes up after all
    assert actions == [StartWorker(0, 2)]


def test_a_worker_that_answers_but_gets_nowhere_is_killed_at_the_time_out() -> None:
    state, _ = feed(running(), progress(10.0, 0, 1, step=1))
    for time in range(50, 1810, 50):
        # Telling the same step again is an answer, and no step.
        event = WorkerAlive(float(time), 0, 1) if time % 100 else progress(float(time), 0, 1, step=1)
        state, actions = feed(state, event, Tick(float(time)))
        assert actions == []
    state, actions = feed(state, WorkerAlive(1809.0, 0, 1), Tick(1809.9))
    assert actions == []
    state, actions = feed(state, Tick(1810.0))
    assert actions == [KillWorker(0, 1)]
    assert state.blocks[0].reason == "the worker hangs: no new step for 1800 s"


def test_building_a_block_may_take_longer_than_a_step() -> None:
    state = running()
    for time in range(50, 10_000, 50):  # shards are copied to the machine first, say
        state, actions = feed(state, WorkerAlive(float(time), 0, 1), Tick(float(time)))
        assert actions == []


def test_a_worker_that_waits_for_room_on_a_disk_does_not_hang() -> None:
    state = running()
    for time in range(50, 10_000, 50):
        state, actions = feed(state, progress(float(time), 0, 1, step=4, trouble="the disk is full"), Tick(float(time)))
        assert actions == []
    assert state.blocks[0].trouble == "the disk is full"
    state, _ = feed(state, progress(10_000.0, 0, 1, step=5))
    assert state.blocks[0].trouble is None


def test_a_full_disk_does_not_excuse_a_worker_that_says_nothing() -> None:
    _, actions = feed(running(), progress(5.0, 0, 1, step=4, trouble="the disk is full"), Tick(65.0))
    assert actions == [KillWorker(0, 1)]


def test_a_hung_worker_does_not_hold_up_a_stop() -> None:
    state, _ = feed(running(), StopRequested(1.0), Tick(60.0))
    assert states(state) == ["stopped"]


def test_one_hung_worker_touches_no_other() -> None:
    state, _ = feed(fresh(2, slots=2), Tick(0.0), started(0.0, 0, 1), started(0.0, 1, 1), WorkerAlive(30.0, 1, 1))
    other = state.blocks[1]
    state, actions = feed(state, Tick(60.0))
    assert actions == [KillWorker(0, 1)]
    assert state.blocks[1] is other


def die(state: CoordinatorState, time: float, node: str = "n") -> CoordinatorState:
    """The worker of block 0 dies and, after the back-off, the next one answers from `node`."""
    attempt = state.blocks[0].attempt
    state, _ = feed(state, WorkerDied(time, 0, attempt, "killed"), Tick(time + 40.0))
    if state.blocks[0].state is BlockState.STARTING:
        state, _ = feed(state, started(time + 41.0, 0, attempt + 1, node))
    return state


def test_a_new_checkpoint_refills_the_budget() -> None:
    state = running()
    for life in range(10):
        state = die(state, 100.0 * life)
        assert states(state) == ["running"]
        state, _ = feed(state, progress(100.0 * life + 50, 0, state.blocks[0].attempt, 10 * life + 12, 10 * life + 10))
    for life in range(10, 13):
        state = die(state, 100.0 * life)
        assert states(state) == ["running"]
    state = die(state, 1300.0)  # the fourth without a new checkpoint
    assert states(state) == ["failed"]


def test_steps_without_a_checkpoint_do_not_refill_it() -> None:
    state = running()
    for life in range(4):
        state, _ = feed(state, progress(100.0 * life + 1, 0, state.blocks[0].attempt, 90 + life, 0))
        state = die(state, 100.0 * life + 2)
    assert states(state) == ["failed"]


def test_what_a_worker_saves_when_it_leaves_refills_the_budget_and_forgives_its_node() -> None:
    policy = Policy(max_restarts=1, slice_steps=10)
    state, _ = feed(fresh(2, slots=1, policy=policy), Tick(0.0), started(0.0, 0, 1), WorkerDied(1.0, 0, 1, "x"))
    state, actions = feed(state, started(1.0, 1, 1), WorkerStopped(2.0, 1, 1, 10))
    assert actions == [StartWorker(0, 2, until=10)]
    state, actions = feed(state, started(2.0, 0, 2), WorkerStopped(3.0, 0, 2, 10))
    assert state.blocks[0].failed_on == ()
    state, actions = feed(state, started(3.0, 0, 3), WorkerDied(4.0, 0, 3, "x"))
    assert states(state)[0] == "restarting"  # one failure, not two in a row


def test_errors_at_the_same_step_with_a_checkpoint_behind_it_in_between_are_two_errors() -> None:
    state, _ = feed(running(), WorkerError(1.0, 0, 1, "no route to the data", -1, "Traceback"), Tick(9.0))
    state, _ = feed(state, started(9.0, 0, 2), progress(10.0, 0, 2, step=50, checkpoint=40))
    state, _ = feed(state, WorkerDied(11.0, 0, 2, "x"), Tick(20.0))
    state, _ = feed(state, WorkerError(21.0, 0, 3, "no route to the data", -1, "Traceback"))
    assert states(state) == ["restarting"]


def test_a_checkpoint_before_the_step_that_raises_does_not_hide_that_it_raises_again() -> None:
    state, _ = feed(running(), WorkerError(1.0, 0, 1, "bug", 47, "Traceback"), Tick(9.0), started(9.0, 0, 2))
    state, _ = feed(
        state, progress(10.0, 0, 2, step=45, checkpoint=40), WorkerError(11.0, 0, 2, "bug", 47, "Traceback")
    )
    assert states(state) == ["failed"]


def on_two_nodes(blocks: int = 1) -> CoordinatorState:
    """Block 0 answers from node a, block 1 (if any) from b."""
    state, _ = feed(fresh(blocks, slots=TWO_NODES), Tick(0.0), started(0.0, 0, 1, "a"))
    return state if blocks == 1 else feed(state, started(0.0, 1, 1, "b"))[0]


def test_a_node_is_avoided_after_two_deaths_of_a_block() -> None:
    state, actions = feed(on_two_nodes(), WorkerDied(1.0, 0, 1, "x"), Tick(2.0))
    assert actions == [StartWorker(0, 2)]
    state, actions = feed(state, started(3.0, 0, 2, "a"), WorkerDied(4.0, 0, 2, "x"), Tick(9.0))
    assert actions == [StartWorker(0, 3, avoid=frozenset({"a"}))]


def test_all_blocks_avoid_it() -> None:
    state = die(on_two_nodes(2), 1.0, "a")
    state, _ = feed(state, WorkerDied(45.0, 0, 2, "x"), WorkerDied(45.0, 1, 1, "x"))
    _, actions = feed(state, Tick(99.0))
    assert actions[0] == StartWorker(0, 3, avoid=frozenset({"a"}))


def test_a_node_gets_one_more_chance_where_others_are_full_and_no_second_one() -> None:
    state = fresh([BlockStatus(0, failed_on=("a", "a")), BlockStatus(1)], slots=TWO_NODES)
    state, actions = feed(state, Tick(0.0))
    # Nobody knows yet where the first one went: for the second there is room on a alone.
    assert actions == [StartWorker(0, 1, avoid=frozenset({"a"})), StartWorker(1, 1)]
    state, _ = feed(state, started(1.0, 0, 1, "b"), started(1.0, 1, 1, "a"))
    for time, attempt in ((2.0, 1), (20.0, 2), (40.0, 3)):
        state, actions = feed(state, WorkerDied(time, 1, attempt, "x", "a"), Tick(time + 9.0))
        if attempt < 3:
            assert actions == [StartWorker(1, attempt + 1)]
    assert actions == []
    _, actions = feed(state, WorkerFinished(50.0, 0, 1, step=100))
    assert actions == [StartWorker(1, 4, avoid=frozenset({"a"}))]


def test_two_blocks_that_each_lost_one_worker_do_not_condemn_the_node() -> None:
    state, _ = feed(fresh(2, slots={"a": 2, "b": 2}), Tick(0.0), started(0.0, 0, 1, "a"), started(0.0, 1, 1, "a"))
    _, actions = feed(state, WorkerDied(1.0, 0, 1, "x"), WorkerDied(1.0, 1, 1, "x"), Tick(2.0))
    assert actions == [StartWorker(0, 2), StartWorker(1, 2)]


def test_a_checkpoint_on_the_node_forgives_it() -> None:
    state = die(on_two_nodes(), 1.0, "a")
    state, _ = feed(state, progress(45.0, 0, 2, step=20, checkpoint=10), WorkerDied(46.0, 0, 2, "x"))
    _, actions = feed(state, Tick(99.0))
    assert actions == [StartWorker(0, 3)]  # one death since


def test_a_checkpoint_elsewhere_does_not_forgive_it() -> None:
    state = die(die(on_two_nodes(), 1.0, "a"), 50.0, "b")
    state, _ = feed(state, progress(95.0, 0, 3, step=20, checkpoint=10), WorkerDied(96.0, 0, 3, "x"))
    _, actions = feed(state, Tick(199.0))
    assert actions == [StartWorker(0, 4, avoid=frozenset({"a"}))]


def test_an_avoided_node_is_better_than_none() -> None:
    state = die(die(on_two_nodes(), 1.0, "a"), 50.0, "b")
    state, _ = feed(state, WorkerDied(95.0, 0, 3, "x"), CapacityChanged(96.0, nodes_of({"a": 1})))
    _, actions = feed(state, Tick(199.0))
    assert actions == [StartWorker(0, 4)]


def test_a_slow_node_is_better_than_a_bad_one() -> None:
    block = BlockStatus(0, slow_on="b", failed_on=("a", "a"))
    _, actions = feed(fresh([block], slots=TWO_NODES), Tick(0.0))
    assert actions == [StartWorker(0, 1, avoid=frozenset({"a"}))]


@pytest.mark.parametrize(("told", "blamed"), [("b", "b"), ("", "a")])
def test_the_blame_goes_to_the_node_of_the_process_that_died(told: str, blamed: str) -> None:
    state, _ = feed(on_two_nodes(), WorkerDied(1.0, 0, 1, "replica 1 was killed", told))
    assert state.blocks[0].failed_on == (blamed,)


def test_a_worker_that_died_before_it_answered_is_on_no_known_node() -> None:
    state, _ = feed(fresh(1, slots=TWO_NODES), Tick(0.0), WorkerDied(1.0, 0, 1, "x"))
    assert state.blocks[0].failed_on == ()


def test_a_worker_that_still_builds_its_block_does_not_hold_up_a_stop_for_ever() -> None:
    state, _ = feed(running(), StopRequested(1.0), WorkerAlive(9.0, 0, 1), Tick(9.9))
    assert states(state) == ["running"]
    state, actions = feed(state, WorkerAlive(9.95, 0, 1), Tick(10.0))
    assert actions == [KillWorker(0, 1)]
    assert states(state) == ["stopped"]
