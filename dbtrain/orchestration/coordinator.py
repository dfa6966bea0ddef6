"""The coordinator: a pure state machine that decides which block has a worker, and when.

`step(state, event) -> (state, actions)` has no clock, no I/O and no Ray: the time comes in the events, and
the driver carries the actions out. What holds at every moment, whatever the order of the events:

* a block has at most one live attempt, attempt numbers only grow, and an older attempt's events change
  nothing;
* there are never more live workers than slots;
* a finished block never starts again;
* a block is restarted at most `max_restarts` times, and one whose code fails twice at the same step is not;
* what happens to one block touches no other, but for the slot it frees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

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
    WorkerAlive,
    WorkerDied,
    WorkerError,
    WorkerEvent,
    WorkerFinished,
    WorkerProgress,
    WorkerStarted,
    WorkerStopped,
)


class BlockState(StrEnum):
    """Where a block stands."""

    PENDING = "pending"
    """Waits for its first worker."""
    STARTING = "starting"
    """A worker is asked for and has not answered yet."""
    RUNNING = "running"
    """A worker trains it."""
    RESTARTING = "restarting"
    """Its worker is gone; a new one starts when the back-off is over and a slot is free."""
    FINISHED = "finished"
    """The last step is durably saved."""
    FAILED = "failed"
    """Given up, with a reason."""
    STOPPED = "stopped"
    """Left on request; starting the run again goes on from its checkpoint."""


LIVE = frozenset({BlockState.STARTING, BlockState.RUNNING})
"""States in which a block has a worker."""
ENDED = frozenset({BlockState.FINISHED, BlockState.FAILED, BlockState.STOPPED})
"""States that a block does not leave."""


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """All that is known of one block."""

    index: int
    state: BlockState = BlockState.PENDING
    attempt: int = 0
    """The newest attempt; 0 before the first."""
    restarts: int = 0
    """New workers after the first one, in this start of the run."""
    since: float = 0.0
    """When the state was entered, seconds."""
    retry_at: float = 0.0
    """In state restarting: the end of the back-off, seconds."""
    reason: str | None = None
    """The newest trouble."""
    error_step: int | None = None
    """Step at which the code raised most recently."""
    step: int = 0
    loss: float = float("nan")
    samples_per_second: float = 0.0
    checkpoint_step: int = 0
    pid: int | None = None
    node: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """When to try again and when to give up."""

    max_restarts: int = 5
    """Restarts of one block before it counts as failed."""
    start_timeout: float = 120.0
    """Seconds a worker may take to answer; after that it counts as dead."""
    first_backoff: float = 0.5
    """Seconds before the first restart of a block; doubled for each further one."""
    longest_backoff: float = 30.0
    """Where the doubling ends, seconds."""

    def backoff(self, restarts: int) -> float:
        """Seconds to wait after `restarts` earlier restarts."""
        return min(self.first_backoff * 2.0 ** min(restarts, 60), self.longest_backoff)


@dataclass(frozen=True, slots=True)
class CoordinatorState:
    """The whole state of a run: everything a decision depends on."""

    blocks: tuple[BlockStatus, ...]
    order: tuple[int, ...]
    """Blocks in the order in which they get a free slot."""
    slots: int
    """Workers that fit at once."""
    policy: Policy
    stopping: bool = False

    @property
    def done(self) -> bool:
        """Every block has ended."""
        return all(block.state in ENDED for block in self.blocks)

    @property
    def live(self) -> int:
        """Blocks that have a worker now."""
        return sum(block.state in LIVE for block in self.blocks)


def initial_state(
    blocks: Iterable[BlockStatus], *, slots: int, policy: Policy, order: Sequence[int] | None = None
) -> CoordinatorState:
    """The state before the first event. Blocks of an earlier start come in as finished or pending.

    Raises:
        ValueError: `order` is not a permutation of the blocks, or there is no slot.
    """
    statuses = tuple(blocks)
    wanted = tuple(range(len(statuses))) if order is None else tuple(order)
    if sorted(wanted) != list(range(len(statuses))):
        raise ValueError(f"order {list(wanted)} does not name each of {len(statuses)} blocks once")
    if [status.index for status in statuses] != list(range(len(statuses))):
        raise ValueError("blocks have to come in the order of their indices")
    if slots < 1:
        raise ValueError("a run needs at least one slot")
    return CoordinatorState(statuses, wanted, slots, policy)


def step(state: CoordinatorState, event: Event) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """The state after an event, and what to do now. Times of successive events do not fall."""
    match event:
        case Tick():
            state, actions = _time_out(state, event.time)
        case StopRequested():
            state, actions = _stop(state, event.time)
        case ScaleRequested() | CapacityChanged():
            return state, ()
        case _:
            before = state.blocks[event.block]
            if before.state not in LIVE or before.attempt != event.attempt:
                return state, ()
            after = _hear(before, event, state)
            state, actions = _put(state, after), ()
            if after.state in LIVE:
                return state, ()  # no slot became free
    state, starts = _fill_slots(state, event.time)
    return state, actions + starts


def _hear(block: BlockStatus, event: WorkerEvent, state: CoordinatorState) -> BlockStatus:
    """What an event of the block's live worker makes of it."""
    match event:
        case WorkerStarted():
            if block.state is BlockState.RUNNING:
                return block
            return replace(
                block,
                state=BlockState.RUNNING,
                since=event.time,
                pid=event.pid,
                node=event.node,
                device=event.device,
            )
        case WorkerAlive():
            return block
        case WorkerProgress():
            return replace(
                block,
                step=event.step,
                loss=event.loss,
                samples_per_second=event.samples_per_second,
                checkpoint_step=event.checkpoint_step,
            )
        case WorkerFinished():
            return _enter(replace(block, step=event.step), BlockState.FINISHED, event.time)
        case WorkerStopped():
            block = replace(block, step=event.step)
            if state.stopping:
                return _enter(block, BlockState.STOPPED, event.time)
            return _lose(block, "the worker was told to stop by someone else", event.time, state)
        case WorkerDied():
            return _lose(block, event.reason, event.time, state)
        case WorkerError():
            repeated = block.error_step == event.step
            block = replace(block, error_step=event.step)
            if repeated:
                return _enter(block, BlockState.FAILED, event.time, event.reason)
            return _lose(block, event.reason, event.time, state)


def _lose(block: BlockStatus, reason: str, time: float, state: CoordinatorState) -> BlockStatus:
    """The block without its worker: stopped, to be restarted, or failed when the budget is spent."""
    if state.stopping:
        return _enter(block, BlockState.STOPPED, time, reason)
    if block.restarts >= state.policy.max_restarts:
        return _enter(block, BlockState.FAILED, time, f"{reason} (after {block.restarts} restarts)")
    retry_at = time + state.policy.backoff(block.restarts)
    return replace(_enter(block, BlockState.RESTARTING, time, reason), retry_at=retry_at)


def _enter(block: BlockStatus, to: BlockState, time: float, reason: str | None = None) -> BlockStatus:
    """The block in a state without a worker."""
    return replace(block, state=to, since=time, reason=reason, pid=None, samples_per_second=0.0)


def _time_out(state: CoordinatorState, time: float) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """Workers that took too long to start are killed and count as dead."""
    actions: list[Action] = []
    limit = state.policy.start_timeout
    for block in state.blocks:
        if block.state is BlockState.STARTING and time - block.since >= limit:
            actions.append(KillWorker(block.index, block.attempt))
            state = _put(state, _lose(block, f"the worker did not start within {limit:g} s", time, state))
    return state, tuple(actions)


def _stop(state: CoordinatorState, time: float) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """Ask live workers to leave; blocks that wait are stopped where they are."""
    if state.stopping:
        return state, ()
    actions: list[Action] = []
    state = replace(state, stopping=True)
    for block in state.blocks:
        if block.state in LIVE:
            actions.append(StopWorker(block.index, block.attempt))
        elif block.state not in ENDED:
            state = _put(state, _enter(block, BlockState.STOPPED, time, block.reason))
    return state, tuple(actions)


def _fill_slots(state: CoordinatorState, time: float) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """Give free slots to waiting blocks, in the run's order; those in their back-off are passed over."""
    if state.stopping:
        return state, ()
    free = state.slots - state.live
    actions: list[Action] = []
    for index in state.order:
        if free <= 0:
            break
        block = state.blocks[index]
        again = block.state is BlockState.RESTARTING
        if not again and block.state is not BlockState.PENDING:
            continue
        if again and time < block.retry_at:
            continue
        started = replace(
            block,
            state=BlockState.STARTING,
            attempt=block.attempt + 1,
            restarts=block.restarts + again,
            since=time,
        )
        state = _put(state, started)
        actions.append(StartWorker(index, started.attempt))
        free -= 1
    return state, tuple(actions)


def _put(state: CoordinatorState, block: BlockStatus) -> CoordinatorState:
    blocks = list(state.blocks)
    blocks[block.index] = block
    return replace(state, blocks=tuple(blocks))
