"""A cluster on paper: it keeps a record of its own, from events and actions alone, and holds the coordinator to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dbtrain.orchestration.coordinator import step
from dbtrain.orchestration.events import (
    Action,
    CapacityChanged,
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
    WorkerStarted,
    WorkerStopped,
)
from dbtrain.orchestration.state import ENDED, LIVE, WAITING, BlockState, CoordinatorState, Policy

_OVER = WorkerFinished | WorkerStopped | WorkerDied | WorkerError


@dataclass
class Attempt:
    """The workers that a block has."""

    number: int
    places: tuple[str, ...]
    """Node of each."""
    until: int | None
    base: int
    """Newest checkpoint when they were started."""
    step: int
    asked_at: float
    answered: bool = False
    answered_at: float = 0.0
    heard_at: float = 0.0
    moved_at: float = 0.0
    reported: bool = False
    told_to_leave: bool = False


class World:
    """Nodes, workers and time; `feed` is the one way to the coordinator, and checks whatever comes back."""

    def __init__(self, state: CoordinatorState):
        blocks = range(len(state.blocks))
        self.state = state
        self.now = 0.0
        self.nodes: tuple[Node, ...] = state.nodes
        self.live: dict[int, Attempt] = {}
        self.newest = [block.attempt for block in state.blocks]
        self.saved = [0 for _ in blocks]
        """Newest checkpoint of each block."""
        self.told = [0 for _ in blocks]
        """Step that each block told last."""
        self.ended = {block.index: block for block in state.blocks if block.state in ENDED}
        self.tries = [0 for _ in blocks]
        """Starts since the newest checkpoint, those not counted that ended because somebody asked for it."""
        self.slow: list[set[str]] = [set() for _ in blocks]
        """Node from which each block was moved away."""
        self.deaths: list[Counter[str]] = [Counter() for _ in blocks]
        """Workers that each block lost on each node since it last got on there."""

    @property
    def policy(self) -> Policy:
        """Of the run."""
        return self.state.policy

    def feed(self, event: Event) -> Sequence[Action]:
        """Tell the coordinator, carry out what it wants, and hold it against the record."""
        before = self.state
        self._record(event)
        self.state, actions = step(before, event)
        assert step(before, event) == (self.state, actions), "a pure function"
        for action in actions:
            match action:
                case StartWorker():
                    assert not before.stopping
                    waited = before.blocks[action.block]
                    assert waited.state is not BlockState.RESTARTING or self.now >= waited.retry_at, "the back-off"
                    self._start(action)
                case StopWorker(block, attempt):
                    self._told_to_leave(block, attempt, event)
                case KillWorker(block, attempt):
                    assert self.live[block].number == attempt
                    left = isinstance(event, CapacityChanged) and not self.live[block].answered
                    if left:  # it may have been sent to the node that is gone: that is no failure
                        gone = {node.id for node in before.nodes} - {node.id for node in self.nodes}
                        assert gone
                        self.tries[block] -= 1
                    assert left or self._overdue(self.live[block]), "only who is overdue is killed"
                    if self.live[block].answered:
                        self.deaths[block][self.live[block].places[0]] += 1
                    del self.live[block]
        started = {action.block for action in actions if isinstance(action, StartWorker)}
        self._check_fairness(started)
        touched = getattr(event, "block", None)
        if touched is not None:
            for old, new in zip(before.blocks, self.state.blocks, strict=True):
                assert new is old or old.index == touched or old.index in started, "an event of one touches no other"
        if isinstance(event, Tick):
            assert not [block for block, attempt in self.live.items() if self._overdue(attempt)]
            self._check_no_room_is_idle()
        return actions

    def check(self) -> None:
        """What holds at any moment."""
        assert {block: (a.number, len(a.places), a.until) for block, a in self.live.items()} == {
            block.index: (block.attempt, block.seats, block.until) for block in self.state.blocks if block.state in LIVE
        }
        for block in self.state.blocks:
            assert block.failures == self.tries[block.index] - (block.index in self.live) or block.state in ENDED
            assert Counter(block.failed_on) == +self.deaths[block.index], "the blame"
            if block.state in ENDED:
                assert self.ended.setdefault(block.index, block) == block, "what has ended stays as it is"
                assert block.state is not BlockState.FAILED or block.reason
            else:
                assert block.index not in self.ended

    def _record(self, event: Event) -> None:
        """What an event of the newest attempt means for the record; older ones mean nothing."""
        if isinstance(event, CapacityChanged):
            self.nodes = event.nodes
        if isinstance(event, Tick | StopRequested | CapacityChanged):
            return
        block = event.block
        attempt = self.live.get(block)
        if attempt is None or attempt.number != getattr(event, "attempt", None):
            return
        match event:
            case WorkerStarted():
                if not attempt.answered:
                    attempt.answered = True
                    attempt.heard_at = attempt.moved_at = attempt.answered_at = event.time
            case WorkerAlive():
                attempt.heard_at = event.time
                if not attempt.reported:
                    attempt.moved_at = event.time
            case WorkerProgress():
                attempt.heard_at = event.time
                attempt.reported = attempt.answered
                if event.step != self.told[block] or event.trouble is not None:
                    attempt.moved_at = event.time
                attempt.step = self.told[block] = event.step
                self._save(block, attempt, event.checkpoint_step)
            case WorkerDied():
                place = event.node_id or (attempt.places[0] if attempt.answered else "")
                if place:
                    self.deaths[block][place] += 1
            case WorkerStopped():
                self.told[block] = event.step
                self._save(block, attempt, event.step)
                at_end = attempt.until is not None and event.step >= attempt.until
                if attempt.told_to_leave or at_end:
                    self.tries[block] -= 1
        if isinstance(event, _OVER):
            del self.live[block]

    def _save(self, block: int, attempt: Attempt, checkpoint: int) -> None:
        self.saved[block] = checkpoint
        if checkpoint > attempt.base:
            self.tries[block] = 1
            if attempt.answered:
                self.deaths[block].pop(attempt.places[0], None)

    def _start(self, action: StartWorker) -> None:
        block = action.block
        assert block not in self.live, "two live attempts of one block"
        assert block not in self.ended, "what has ended does not start again"
        assert action.attempt == self.newest[block] + 1, "attempts grow by one"
        self.newest[block] = action.attempt
        self.tries[block] += 1
        assert self.tries[block] <= 1 + self.policy.max_restarts, "the budget is respected"
        assert self.state.blocks[block].replicas % action.replicas == 0, "replicas share a batch equally"
        bad, worse = (
            {place for deaths in self.deaths for place, count in deaths.items() if count >= least} for least in (2, 3)
        )
        if sum(node.slots for node in self.nodes if node.id not in worse):
            assert worse <= action.avoid, "there are better nodes"
        if self._left_outside(bad) >= self.state.blocks[block].replicas:
            assert bad <= action.avoid, "there is room on better nodes"
        assert action.avoid <= bad | self.slow[block], "for no reason"
        self.live[block] = Attempt(
            action.attempt, self._place(action), action.until, self.saved[block], self.saved[block], self.now
        )

    def _place(self, action: StartWorker) -> tuple[str, ...]:
        """Nodes for the workers, another choice for every attempt; there has to be room for all of them now."""
        workers = sum(len(attempt.places) for attempt in self.live.values()) + action.replicas
        assert self.state.limit is None or workers <= self.state.limit
        taken = Counter(place for attempt in self.live.values() for place in attempt.places)
        free = [
            node.id
            for node in self.nodes
            for _ in range(node.slots - taken[node.id])
            if node.id not in action.avoid  # nobody may be driven out of their place either
        ]
        assert len(free) >= action.replicas, "no worker is started for which there is no room"
        turn = (action.block + action.attempt) % len(free)
        return tuple((free[turn:] + free[:turn])[: action.replicas])

    def _left_outside(self, nodes: set[str]) -> int:
        """Room for more workers outside some nodes, wherever those are that have not answered."""
        fit = sum(node.slots for node in self.nodes if node.id not in nodes)
        taken = sum(
            len(attempt.places) if not attempt.answered else sum(place not in nodes for place in attempt.places)
            for attempt in self.live.values()
        )
        return fit - taken

    def _told_to_leave(self, block: int, number: int, event: Event) -> None:
        attempt = self.live[block]
        assert attempt.number == number
        assert not attempt.told_to_leave or isinstance(event, StopRequested), "told once"
        attempt.told_to_leave = True
        if (self.state.blocks[block].leaving or "").startswith("it is slow") and isinstance(event, Tick):
            assert self.policy.move_slow
            assert not self.slow[block], "moved once"
            self.slow[block].add(attempt.places[0])

    def _overdue(self, attempt: Attempt) -> bool:
        if not attempt.answered:
            return self.now - attempt.asked_at >= self.policy.start_timeout
        if self.state.stopping and not attempt.reported and self.now - attempt.answered_at >= self.policy.start_timeout:
            return True
        silent = self.now - attempt.heard_at >= self.policy.heartbeat_timeout
        return silent or self.now - attempt.moved_at >= self.policy.step_timeout

    def _check_fairness(self, started: set[int]) -> None:
        """With time slices nobody is overtaken by a block that is further."""
        for block in started & {block for block, attempt in self.live.items() if attempt.until is not None}:
            for other in self.state.blocks:
                ready = other.state in WAITING and (
                    other.state is not BlockState.RESTARTING or self.now >= other.retry_at
                )
                assert not ready or self.told[other.index] >= self.told[block], "overtaken"

    def _check_no_room_is_idle(self) -> None:
        """Without time slices and nodes to avoid: a block waits only for as many workers as there is no room for."""
        state = self.state
        if state.stopping or self.policy.slice_steps is not None or any(deaths for deaths in self.deaths):
            return
        fit = sum(node.slots for node in self.nodes)
        fit = fit if state.limit is None else min(fit, state.limit)
        for block in state.blocks:
            if block.state in (BlockState.PENDING, BlockState.PAUSED) and block.slow_on is None:
                assert block.replicas > fit - sum(len(attempt.places) for attempt in self.live.values())
