"""The coordinator against a simulated world in which workers do whatever hypothesis likes, in any order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dbtrain.orchestration.coordinator import step
from dbtrain.orchestration.events import (
    Event,
    KillWorker,
    Node,
    StartWorker,
    StopRequested,
    StopWorker,
    Tick,
    WorkerDied,
    WorkerError,
    WorkerFinished,
    WorkerProgress,
    WorkerStarted,
    WorkerStopped,
)
from dbtrain.orchestration.state import (
    ENDED,
    LIVE,
    BlockState,
    BlockStatus,
    CoordinatorState,
    Policy,
    initial_state,
)

TOTAL = 10


class World(RuleBasedStateMachine):
    """Keeps its own record of who is alive, from the actions alone, and compares."""

    state: CoordinatorState

    @initialize(
        finished=st.lists(st.booleans(), min_size=1, max_size=6),
        slots=st.integers(1, 4),
        budget=st.integers(0, 3),
        shuffle=st.randoms(use_true_random=False),
    )
    def begin(self, finished: list[bool], slots: int, budget: int, shuffle: object) -> None:
        order = list(range(len(finished)))
        shuffle.shuffle(order)  # type: ignore[attr-defined]
        blocks = [
            BlockStatus(index, state=BlockState.FINISHED if done else BlockState.PENDING)
            for index, done in enumerate(finished)
        ]
        self.policy = Policy(max_restarts=budget, start_timeout=5.0)
        self.state = initial_state(blocks, nodes=[Node("n", slots)], policy=self.policy, order=order)
        self.now = 0.0
        self.alive: dict[int, int] = {}
        self.asked_to_stop: set[int] = set()
        self.newest = [block.attempt for block in blocks]
        self.first_ended = {b.index: b for b in blocks if b.state in ENDED}
        self.starts = [0] * len(blocks)
        self.feed(Tick(self.now))

    def feed(self, event: Event, loser: int | None = None) -> None:
        before = self.state
        if loser is not None:
            del self.alive[loser]
            self.asked_to_stop.discard(loser)
        self.state, actions = step(before, event)
        assert step(before, event) == (self.state, actions), "a pure function"
        for action in actions:
            block = action.block
            if isinstance(action, StartWorker):
                assert block not in self.alive, "two live attempts of one block"
                assert action.attempt == self.newest[block] + 1, "attempts grow by one"
                assert not before.stopping
                self.newest[block] = action.attempt
                self.alive[block] = action.attempt
                self.starts[block] += 1
            elif isinstance(action, StopWorker):
                assert self.alive[block] == action.attempt
                self.asked_to_stop.add(block)
            elif isinstance(action, KillWorker):
                assert self.alive.pop(block) == action.attempt
                self.asked_to_stop.discard(block)
        touched = getattr(event, "block", None)
        started = {action.block for action in actions if isinstance(action, StartWorker)}
        if touched is not None:
            for old, new in zip(before.blocks, self.state.blocks, strict=True):
                if old.index != touched and old.index not in started:
                    assert new is old, "an event of one block touches no other"

    def pick(self, data: st.DataObject) -> tuple[int, int]:
        block = data.draw(st.sampled_from(sorted(self.alive)))
        return block, self.alive[block]

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick(self.now))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def worker_starts(self, data: st.DataObject) -> None:
        block, attempt = self.pick(data)
        self.feed(WorkerStarted(self.now, block, attempt, 7, "node", "cpu"))
        assert self.state.blocks[block].state is BlockState.RUNNING

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), at=st.integers(0, TOTAL))
    def worker_progresses(self, data: st.DataObject, at: int) -> None:
        block, attempt = self.pick(data)
        self.feed(WorkerProgress(self.now, block, attempt, at, 0.5, 10.0, 0))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def worker_finishes(self, data: st.DataObject) -> None:
        block, attempt = self.pick(data)
        self.feed(WorkerFinished(self.now, block, attempt, TOTAL), loser=block)
        assert self.state.blocks[block].state is BlockState.FINISHED

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        block, attempt = self.pick(data)
        self.feed(WorkerDied(self.now, block, attempt, "killed"), loser=block)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), at=st.integers(-1, 2))
    def worker_raises(self, data: st.DataObject, at: int) -> None:
        block, attempt = self.pick(data)
        repeated = self.state.blocks[block].error_step == at
        self.feed(WorkerError(self.now, block, attempt, "bug", at, "Traceback"), loser=block)
        if repeated:
            assert self.state.blocks[block].state is BlockState.FAILED

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def worker_leaves(self, data: st.DataObject) -> None:
        block, attempt = self.pick(data)
        self.feed(WorkerStopped(self.now, block, attempt, 3), loser=block)

    @rule(data=st.data(), kind=st.integers(0, 4))
    def stale_news(self, data: st.DataObject, kind: int) -> None:
        block = data.draw(st.integers(0, len(self.state.blocks) - 1))
        newest = self.newest[block] if block not in self.alive else self.newest[block] - 1
        attempt = data.draw(st.integers(0, max(0, newest)))
        events: list[Event] = [
            WorkerStarted(self.now, block, attempt, 7, "node", "cpu"),
            WorkerProgress(self.now, block, attempt, 1, 0.5, 10.0, 0),
            WorkerFinished(self.now, block, attempt, TOTAL),
            WorkerStopped(self.now, block, attempt, 3),
            WorkerDied(self.now, block, attempt, "late"),
        ]
        before = self.state
        self.feed(events[kind])
        assert self.state == before

    @rule()
    def somebody_stops_the_run(self) -> None:
        self.feed(StopRequested(self.now))

    @invariant()
    def record_and_state_agree(self) -> None:
        live = {block.index: block.attempt for block in self.state.blocks if block.state in LIVE}
        assert live == self.alive
        assert len(live) <= self.state.slots

    @invariant()
    def ended_blocks_stay_as_they_are(self) -> None:
        for block in self.state.blocks:
            if block.state in ENDED:
                assert self.first_ended.setdefault(block.index, block) == block
                assert block.state is not BlockState.FAILED or block.reason
            else:
                assert block.index not in self.first_ended

    @invariant()
    def budget_is_respected(self) -> None:
        for block in self.state.blocks:
            assert block.failures <= self.policy.max_restarts

    @invariant()
    def no_slot_is_idle_while_a_fresh_block_waits(self) -> None:
        if self.state.live < self.state.slots:
            assert all(block.state is not BlockState.PENDING for block in self.state.blocks)

    def teardown(self) -> None:
        """From wherever it stands, the run ends once the workers do their work."""
        if not hasattr(self, "now"):
            return
        for _ in range(1000):
            if self.state.done:
                break
            for block, attempt in list(self.alive.items()):
                stopped = block in self.asked_to_stop
                event = WorkerStopped if stopped else WorkerFinished
                self.feed(event(self.now, block, attempt, TOTAL), loser=block)
            self.now += 31.0
            self.feed(Tick(self.now))
        assert self.state.done
        self.ended_blocks_stay_as_they_are()


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
