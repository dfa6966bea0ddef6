"""The coordinator: a pure state machine that decides which block has workers, and when.

`step(state, event) -> (state, actions)` has no clock, no I/O and no Ray: the time comes in the events, and
the driver carries the actions out. What holds at every moment, whatever the order of the events:

* a block has at most one live attempt, attempt numbers only grow, and an older attempt's events change
  nothing;
* no worker is started for which there is no room;
* a finished block never starts again;
* a block is restarted at most `max_restarts` times in a row without a new checkpoint, and one whose code fails
  twice at the same step is not;
* what happens to one block touches no other, but for the room it frees.

An attempt of a block is one worker, or several replicas that live and die together.
"""

from __future__ import annotations

from dataclasses import replace

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
from dbtrain.orchestration.health import overdue, weigh
from dbtrain.orchestration.state import ENDED, LIVE, WAITING, BlockState, BlockStatus, CoordinatorState


def step(state: CoordinatorState, event: Event) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """The state after an event, and what to do now. Times of successive events do not fall."""
    actions: tuple[Action, ...] = ()
    match event:
        case Tick():
            state, actions = _look_after(state, event.time)
        case StopRequested():
            state, actions = _stop(state, event.time)
        case ScaleRequested():
            state, actions = _scale(state, event)
        case CapacityChanged():
            state = replace(state, nodes=event.nodes)
        case _:
            before = state.blocks[event.block]
            if before.state not in LIVE or before.attempt != event.attempt:
                return state, ()
            after = _hear(before, event, state)
            state = _put(state, after)
            if after.state in LIVE:
                return state, ()  # no room became free
    state, starts = _give_room(state, event.time)
    return state, actions + starts


def _hear(block: BlockStatus, event: WorkerEvent, state: CoordinatorState) -> BlockStatus:
    """What an event of the block's live workers makes of it."""
    match event:
        case WorkerStarted():
            if block.state is BlockState.RUNNING:
                return block
            return replace(
                block,
                state=BlockState.RUNNING,
                since=event.time,
                heard_at=event.time,
                moved_at=event.time,
                pid=event.pid,
                node=event.node,
                node_id=event.node_id,
                device=event.device,
            )
        case WorkerAlive():
            return replace(block, heard_at=event.time)
        case WorkerProgress():
            # Whoever waits for something that it names does not hang.
            moved = event.step != block.step or event.trouble is not None
            if event.checkpoint_step > block.base_step and block.node_id in block.failed_on:
                # A node on which a block gets on is forgiven.
                block = replace(block, failed_on=tuple(node for node in block.failed_on if node != block.node_id))
            return replace(
                block,
                step=event.step,
                loss=event.loss,
                samples_per_second=event.samples_per_second,
                checkpoint_step=event.checkpoint_step,
                trouble=event.trouble,
                rollbacks=event.rollbacks,
                heard_at=event.time,
                moved_at=event.time if moved else block.moved_at,
            )
        case WorkerFinished():
            return _leave(replace(block, step=event.step), BlockState.FINISHED, event.time)
        case WorkerStopped():
            block = replace(block, step=event.step, checkpoint_step=max(event.step, block.checkpoint_step))
            if state.stopping:
                return _leave(block, BlockState.STOPPED, event.time)
            if block.leaving is not None or (block.until is not None and event.step >= block.until):
                return _leave(block, BlockState.PAUSED, event.time)
            return _lose(block, "the worker was told to stop by someone else", event.time, state)
        case WorkerDied():
            return _lose(_blame(block, event.node_id or block.node_id), event.reason, event.time, state)
        case WorkerError():
            repeated = block.error_step == event.step
            block = replace(block, error_step=event.step)
            if repeated:
                return _leave(block, BlockState.FAILED, event.time, event.reason)
            return _lose(block, event.reason, event.time, state)


def _blame(block: BlockStatus, node_id: str) -> BlockStatus:
    """Remember where the block lost a worker."""
    return replace(block, failed_on=(*block.failed_on, node_id)) if node_id else block


def _lose(block: BlockStatus, reason: str, time: float, state: CoordinatorState) -> BlockStatus:
    """The block without its workers: stopped, to be restarted, or failed when the budget is spent."""
    if state.stopping:
        return _leave(block, BlockState.STOPPED, time, reason)
    failures = 0 if block.checkpoint_step > block.base_step else block.failures
    if failures >= state.policy.max_restarts:
        times = f"{failures} restart{'' if failures == 1 else 's'} without a new checkpoint"
        return _leave(block, BlockState.FAILED, time, f"{reason} (after {times})")
    retry_at = time + state.policy.backoff(failures)
    return replace(_leave(block, BlockState.RESTARTING, time, reason), retry_at=retry_at, failures=failures + 1)


def _leave(block: BlockStatus, to: BlockState, time: float, reason: str | None = None) -> BlockStatus:
    """The block in a state without workers."""
    return replace(
        block,
        state=to,
        since=time,
        reason=reason,
        samples_per_second=0.0,
        seats=0,
        until=None,
        leaving=None,
        trouble=None,
        slow_checks=0,
        slow=None,
        pid=None,
        node_id="",
    )


def _look_after(state: CoordinatorState, time: float) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """Kill workers that took too long for something, and look for slow ones."""
    actions: list[Action] = []
    for block in state.blocks:
        if (reason := overdue(block, state.policy, time)) is not None:
            actions.append(KillWorker(block.index, block.attempt))
            state = _put(state, _lose(_blame(block, block.node_id), reason, time, state))
    state, slow = weigh(state, time)
    for block in slow:
        state = _put(state, replace(block, leaving="it is slow here", slow_on=block.node_id))
        actions.append(StopWorker(block.index, block.attempt))
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
            state = _put(state, _leave(block, BlockState.STOPPED, time, block.reason))
    return state, tuple(actions)


def _scale(state: CoordinatorState, event: ScaleRequested) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """Another number of workers for a block: those it has save and leave, and as many as wanted start."""
    block = state.blocks[event.block]
    if event.replicas == block.replicas or block.state in ENDED:
        return state, ()
    block = replace(block, replicas=event.replicas)
    if block.state not in LIVE or block.leaving is not None or state.stopping:
        return _put(state, block), ()
    block = replace(block, leaving=f"it goes on with {event.replicas} worker{'' if event.replicas == 1 else 's'}")
    return _put(state, block), (StopWorker(block.index, block.attempt),)


def _give_room(state: CoordinatorState, time: float) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """Start blocks that wait as long as there is room; those in their back-off are passed over."""
    if state.stopping:
        return state, ()
    ready = [block for index in state.order if _is_ready(block := state.blocks[index], time)]
    if not ready or state.live >= state.slots:
        return state, ()
    slice_steps = state.policy.slice_steps
    if slice_steps is not None:
        ready.sort(key=lambda block: block.step)  # stable: those who lag first, then as in `order`
        wanted = sum(block.replicas for block in state.blocks if block.state not in ENDED)
        if wanted <= state.slots:
            slice_steps = None
    actions: list[Action] = []
    bad_nodes = state.avoided()
    for block in ready:
        if state.live >= state.slots:
            break
        avoid = bad_nodes if block.slow_on is None else bad_nodes | {block.slow_on}
        # A node that is avoided is better than none.
        avoid = avoid if state.slots_outside(avoid) > 0 else frozenset()
        seats = _seats(block, state.slots_outside(avoid))
        if seats > state.slots_outside(avoid) - state.live_outside(avoid) or seats > state.slots - state.live:
            continue
        started = replace(
            block,
            state=BlockState.STARTING,
            attempt=block.attempt + 1,
            restarts=block.restarts + (block.state is BlockState.RESTARTING),
            since=time,
            seats=seats,
            until=None if slice_steps is None else block.step - block.step % slice_steps + slice_steps,
            base_step=block.checkpoint_step,
        )
        state = _put(state, started)
        actions.append(StartWorker(block.index, started.attempt, seats, started.until, avoid))
    return state, tuple(actions)


def _is_ready(block: BlockStatus, time: float) -> bool:
    return block.state in WAITING and (block.state is not BlockState.RESTARTING or time >= block.retry_at)


def _seats(block: BlockStatus, room: int) -> int:
    """As many workers as wanted, or where nodes have left, the largest part of them that divides a batch as well."""
    return next(seats for seats in range(block.replicas, 0, -1) if seats <= max(room, 1) and not block.replicas % seats)


def _put(state: CoordinatorState, block: BlockStatus) -> CoordinatorState:
    blocks = list(state.blocks)
    blocks[block.index] = block
    return replace(state, blocks=tuple(blocks))
