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
from dbtrain.orchestration.room import give_room, make_way
from dbtrain.orchestration.state import ENDED, LIVE, BlockState, BlockStatus, CoordinatorState


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
            state, actions = _change_nodes(state, event)
        case _:
            before = state.blocks[event.block]
            if before.state not in LIVE or before.attempt != event.attempt:
                return state, ()
            after = _hear(before, event, state)
            state = state.put(after)
            if after.state in LIVE:
                return state, ()  # no room became free
    state, starts = give_room(state, event.time)
    actions += starts
    if isinstance(event, Tick):
        state, stops = make_way(state, event.time)
        actions += stops
    return state, actions


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
                reported=False,
                pid=event.pid,
                node=event.node,
                node_id=event.node_id,
                device=event.device,
            )
        case WorkerAlive():
            # Building a block may take long, where shards are copied first: steps are counted from its first report.
            return replace(block, heard_at=event.time, moved_at=block.moved_at if block.reported else event.time)
        case WorkerProgress():
            # Whoever waits for something that it names does not hang.
            moved = event.step != block.step or event.trouble is not None
            return replace(
                _forgive(block, event.checkpoint_step),
                step=event.step,
                loss=event.loss,
                samples_per_second=event.samples_per_second,
                checkpoint_step=event.checkpoint_step,
                trouble=event.trouble,
                rollbacks=event.rollbacks,
                heard_at=event.time,
                moved_at=event.time if moved else block.moved_at,
                reported=True,
            )
        case WorkerFinished():
            return _leave(replace(block, step=event.step), BlockState.FINISHED, event.time)
        case WorkerStopped():
            block = replace(_forgive(block, event.step), step=event.step)
            block = replace(block, checkpoint_step=max(event.step, block.checkpoint_step))
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


def _forgive(block: BlockStatus, checkpoint_step: int) -> BlockStatus:
    """What went wrong before a new checkpoint counts no longer: against the block, nor against the node it is on."""
    if checkpoint_step <= block.base_step:
        return block
    if block.failures:
        block = replace(block, failures=0)
    if block.error_step is not None and block.error_step < checkpoint_step:
        block = replace(block, error_step=None)
    if block.node_id in block.failed_on:
        block = replace(block, failed_on=tuple(node for node in block.failed_on if node != block.node_id))
    return block


def _blame(block: BlockStatus, node_id: str) -> BlockStatus:
    """Remember where the block lost a worker."""
    return replace(block, failed_on=(*block.failed_on, node_id)) if node_id else block


def _lose(block: BlockStatus, reason: str, time: float, state: CoordinatorState) -> BlockStatus:
    """The block without its workers: stopped, to be restarted, or failed when the budget is spent."""
    if state.stopping:
        return _leave(block, BlockState.STOPPED, time, reason)
    if block.failures >= state.policy.max_restarts:
        times = f"{block.failures} restart{'' if block.failures == 1 else 's'} without a new checkpoint"
        return _leave(block, BlockState.FAILED, time, f"{reason} (after {times})")
    retry_at = time + state.policy.backoff(block.failures)
    return replace(_leave(block, BlockState.RESTARTING, time, reason), retry_at=retry_at, failures=block.failures + 1)


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
        if (reason := overdue(block, state.policy, time, state.stopping)) is not None:
            actions.append(KillWorker(block.index, block.attempt))
            state = state.put(_lose(_blame(block, block.node_id), reason, time, state))
    state, slow = weigh(state, time)
    for block in slow:
        state = state.put(replace(block, leaving="it is slow here", slow_on=block.node_id))
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
            state = state.put(_leave(block, BlockState.STOPPED, time, block.reason))
    return state, tuple(actions)


def _change_nodes(state: CoordinatorState, event: CapacityChanged) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """Other nodes. Workers that have not answered when one leaves are asked for anew: they may have been sent there."""
    gone = {node.id for node in state.nodes} - {node.id for node in event.nodes}
    state = replace(state, nodes=event.nodes)
    asked = [block for block in state.blocks if gone and block.state is BlockState.STARTING]
    for block in asked:
        to = BlockState.STOPPED if state.stopping else BlockState.PAUSED
        state = state.put(_leave(block, to, event.time, block.reason))
    return state, tuple(KillWorker(block.index, block.attempt) for block in asked)


def _scale(state: CoordinatorState, event: ScaleRequested) -> tuple[CoordinatorState, tuple[Action, ...]]:
    """Another number of workers for a block: those it has save and leave, and as many as wanted start."""
    block = state.blocks[event.block]
    as_wanted = block.seats in (0, event.replicas)
    if block.state in ENDED or (as_wanted and event.replicas == block.replicas):
        return state, ()
    block = replace(block, replicas=event.replicas)
    if as_wanted or block.leaving is not None or state.stopping:
        return state.put(block), ()
    block = replace(block, leaving=f"it goes on with {event.replicas} worker{'' if event.replicas == 1 else 's'}")
    return state.put(block), (StopWorker(block.index, block.attempt),)
