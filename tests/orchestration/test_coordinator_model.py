"""The coordinator against a world in which nodes, workers and users do whatever hypothesis likes, in any order."""

from __future__ import annotations

from random import Random

from coordinator_world import World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dbtrain.orchestration.events import (
    CapacityChanged,
    Event,
    Node,
    ScaleRequested,
    StopRequested,
    Tick,
    WorkerAlive,
    WorkerDied,
    WorkerError,
    WorkerFinished,
    WorkerProgress,
    WorkerStarted,
    WorkerStopped,
)
from dbtrain.orchestration.state import BlockState, BlockStatus, Policy, initial_state

TOTAL = 24
SLICE = 4


class AnyOrder(RuleBasedStateMachine):
    """Rules are what may happen; what must hold is in `World`."""

    world: World

    @initialize(
        groups=st.lists(st.integers(0, 4), min_size=1, max_size=6),
        slots=st.lists(st.integers(1, 3), min_size=1, max_size=4),
        limit=st.none() | st.integers(1, 6),
        budget=st.sampled_from([0, 1, 3, 9]),
        slices=st.booleans(),
        move_slow=st.booleans(),
        shuffle=st.randoms(use_true_random=False),
    )
    def begin(
        self,
        groups: list[int],
        slots: list[int],
        limit: int | None,
        budget: int,
        slices: bool,
        move_slow: bool,
        shuffle: Random,
    ) -> None:
        order = list(range(len(groups)))
        shuffle.shuffle(order)
        blocks = [
            BlockStatus(index, replicas=replicas) if replicas else BlockStatus(index, state=BlockState.FINISHED)
            for index, replicas in enumerate(groups)
        ]
        policy = Policy(
            max_restarts=budget,
            start_timeout=5.0,
            heartbeat_timeout=20.0,
            step_timeout=30.0,
            slice_steps=SLICE if slices else None,
            move_slow=move_slow,
        )
        nodes = [Node(f"n{number}", count) for number, count in enumerate(slots)]
        self.nodes_so_far = len(nodes)
        self.world = World(initial_state(blocks, nodes=nodes, policy=policy, order=order, limit=limit))
        self.world.feed(Tick(0.0))

    def pick(self, data: st.DataObject) -> tuple[int, int]:
        block = data.draw(st.sampled_from(sorted(self.world.live)))
        return block, self.world.live[block].number

    def answer(self, block: int) -> None:
        attempt = self.world.live[block]
        place = attempt.places[0]
        self.world.feed(WorkerStarted(self.world.now, block, attempt.number, 7, "10.0.0.1", "cpu", place))

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.feed(Tick(self.world.now))

    @rule(seconds=st.floats(4.0, 19.0))
    def time_passes_and_all_are_well(self, seconds: float) -> None:
        self.world.now += seconds
        for block, attempt in sorted(self.world.live.items()):
            if attempt.answered:
                self.world.feed(WorkerAlive(self.world.now, block, attempt.number))
        self.world.feed(Tick(self.world.now))

    @rule()
    def all_answer(self) -> None:
        for block in sorted(self.world.live):
            self.answer(block)
            assert self.world.state.blocks[block].state is BlockState.RUNNING

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def one_answers(self, data: st.DataObject) -> None:
        self.answer(self.pick(data)[0])

    @precondition(lambda self: self.world.live)
    @rule(
        data=st.data(),
        steps=st.integers(0, 3),
        saves=st.booleans(),
        speed=st.sampled_from([0.0, 1.0, 10.0, 50.0]),
        trouble=st.sampled_from([None, None, "no room on the disk"]),
    )
    def one_gets_on(self, data: st.DataObject, steps: int, saves: bool, speed: float, trouble: str | None) -> None:
        block, attempt = self.pick(data)
        now = self.world.live[block]
        at = min(now.step + steps, now.until or TOTAL)
        saved = at if saves else self.world.saved[block]
        self.world.feed(WorkerProgress(self.world.now, block, attempt, at, 0.5, speed, saved, trouble))

    @rule(speeds=st.lists(st.sampled_from([1.0, 10.0, 10.0, 30.0]), min_size=6, max_size=6))
    def all_get_on_for_a_while(self, speeds: list[float]) -> None:
        for _ in range(4):
            self.world.now += 5.0
            for block, attempt in sorted(self.world.live.items()):
                if attempt.answered:
                    at = min(attempt.step + 1, attempt.until or TOTAL)
                    news = (attempt.number, at, 0.5, speeds[block], self.world.saved[block])
                    self.world.feed(WorkerProgress(self.world.now, block, *news))
            self.world.feed(Tick(self.world.now))

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def one_finishes(self, data: st.DataObject) -> None:
        block, attempt = self.pick(data)
        self.world.feed(WorkerFinished(self.world.now, block, attempt, TOTAL))
        assert self.world.state.blocks[block].state is BlockState.FINISHED

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), known=st.booleans())
    def one_dies(self, data: st.DataObject, known: bool) -> None:
        block, attempt = self.pick(data)
        place = data.draw(st.sampled_from(self.world.live[block].places)) if known else ""
        self.world.feed(WorkerDied(self.world.now, block, attempt, "killed", place))

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), at=st.integers(-1, 2))
    def one_raises(self, data: st.DataObject, at: int) -> None:
        block, attempt = self.pick(data)
        repeated = self.world.state.blocks[block].error_step == at
        self.world.feed(WorkerError(self.world.now, block, attempt, "bug", at, "Traceback"))
        assert not repeated or self.world.state.blocks[block].state is BlockState.FAILED

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), unasked=st.sampled_from([False, False, True]))
    def one_leaves(self, data: st.DataObject, unasked: bool) -> None:
        block, attempt = self.pick(data)
        now = self.world.live[block]
        if now.told_to_leave or unasked:
            self.world.feed(WorkerStopped(self.world.now, block, attempt, now.step))
        elif now.until is not None:
            self.world.feed(WorkerStopped(self.world.now, block, attempt, now.until))
            assert self.world.told[block] == now.until

    @rule(slots=st.integers(1, 3))
    def a_node_joins(self, slots: int) -> None:
        nodes = (*self.world.nodes, Node(f"n{self.nodes_so_far}", slots))
        self.nodes_so_far += 1
        self.world.feed(CapacityChanged(self.world.now, nodes))

    @precondition(lambda self: self.world.nodes)
    @rule(data=st.data(), heard_first=st.booleans())
    def a_node_leaves(self, data: st.DataObject, heard_first: bool) -> None:
        """The cluster may know before or after the workers there are found dead."""
        lost = data.draw(st.sampled_from(self.world.nodes))
        left = tuple(node for node in self.world.nodes if node is not lost)
        dead = [(block, attempt.number) for block, attempt in self.world.live.items() if lost.id in attempt.places]
        if heard_first:
            self.world.feed(CapacityChanged(self.world.now, left))
        for block, number in dead:
            self.world.feed(WorkerDied(self.world.now, block, number, "its node is gone", lost.id))
        if not heard_first:
            # Whoever was started there meanwhile stays: it hangs, or is found dead by another rule.
            self.world.feed(CapacityChanged(self.world.now, left))

    @rule(data=st.data(), replicas=st.integers(1, 4))
    def somebody_scales(self, data: st.DataObject, replicas: int) -> None:
        block = data.draw(st.integers(0, len(self.world.state.blocks) - 1))
        ended = block in self.world.ended
        self.world.feed(ScaleRequested(self.world.now, block, replicas))
        assert ended or self.world.state.blocks[block].replicas == replicas

    @rule(really=st.sampled_from([False] * 7 + [True]))
    def somebody_stops_the_run(self, really: bool) -> None:
        if really:
            self.world.feed(StopRequested(self.world.now))
            assert all(attempt.told_to_leave for attempt in self.world.live.values())

    @rule(data=st.data(), kind=st.integers(0, 6))
    def stale_news(self, data: st.DataObject, kind: int) -> None:
        world = self.world
        block = data.draw(st.integers(0, len(world.state.blocks) - 1))
        newest = world.newest[block] - (block in world.live)
        attempt = data.draw(st.integers(0, max(0, newest)))
        events: list[Event] = [
            WorkerStarted(world.now, block, attempt, 7, "10.0.0.1", "cpu", "n0"),
            WorkerAlive(world.now, block, attempt),
            WorkerProgress(world.now, block, attempt, 1, 0.5, 10.0, 1),
            WorkerFinished(world.now, block, attempt, TOTAL),
            WorkerStopped(world.now, block, attempt, 3),
            WorkerDied(world.now, block, attempt, "late", "n0"),
            WorkerError(world.now, block, attempt, "late", 3, "Traceback"),
        ]
        before = world.state
        assert list(world.feed(events[kind])) == []
        assert world.state == before

    @invariant()
    def the_record_holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """From wherever it stands, the run ends once there is a node and workers do their work."""
        if not hasattr(self, "world"):
            return
        world = self.world
        if not world.nodes:
            self.a_node_joins(slots=1)
        for _ in range(1000):
            if world.state.done:
                break
            for block in sorted(world.live):
                self.do_the_work(block)
            world.now += 31.0
            world.feed(Tick(world.now))
            world.check()
        assert world.state.done

    def do_the_work(self, block: int) -> None:
        world = self.world
        attempt = world.live[block]
        if not attempt.answered:
            self.answer(block)
        if attempt.told_to_leave:
            world.feed(WorkerStopped(world.now, block, attempt.number, attempt.step))
        elif attempt.until is not None and attempt.until < TOTAL:
            world.feed(WorkerStopped(world.now, block, attempt.number, attempt.until))
        else:
            world.feed(WorkerFinished(world.now, block, attempt.number, TOTAL))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
