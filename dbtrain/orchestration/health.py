"""Is a worker still well? What the coordinator concludes from the times at which workers were heard of."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from dbtrain.orchestration.state import BlockState, BlockStatus, CoordinatorState, Policy

WEIGH_EVERY = 5.0
"""Seconds between two comparisons of the workers' speeds."""
CHECKS = 3
"""So many comparisons in a row have to find a worker slow."""
FEWEST = 3
"""Of fewer workers none is called slow: there is no telling which of them is unusual."""


def overdue(block: BlockStatus, policy: Policy, time: float, stopping: bool) -> str | None:
    """Why the block's workers have to be given up now; None while all is well."""
    if block.state is BlockState.STARTING and time - block.since >= policy.start_timeout:
        return f"the worker did not start within {policy.start_timeout:g} s"
    if block.state is not BlockState.RUNNING:
        return None
    if stopping and not block.reported and time - block.since >= policy.start_timeout:
        return "the worker was still building its block when the run was to stop"  # there is nothing to save
    if time - block.heard_at >= policy.heartbeat_timeout:
        return f"the worker hangs: no answer for {policy.heartbeat_timeout:g} s"
    if time - block.moved_at >= policy.step_timeout:
        return f"the worker hangs: no new step for {policy.step_timeout:g} s"
    return None


def weigh(state: CoordinatorState, time: float) -> tuple[CoordinatorState, list[BlockStatus]]:
    """Compare workers with each other, now and then; also returns the blocks that shall train elsewhere.

    The measure is layers a second and worker, so that a block of more layers or fewer replicas is not called slow.
    """
    if time - state.weighed_at < WEIGH_EVERY:
        return state, []
    state = replace(state, weighed_at=time)
    speeds = {
        block.index: block.samples_per_second * block.cost / block.seats
        for block in state.blocks
        if block.state is BlockState.RUNNING and block.samples_per_second > 0 and block.leaving is None
    }
    if len(speeds) < FEWEST or state.stopping:
        return state, []
    usual = median(speeds.values())
    blocks = list(state.blocks)
    for index, speed in speeds.items():
        times = usual / speed
        checks = blocks[index].slow_checks + 1 if times >= state.policy.slow_factor else 0
        slow = f"takes {times:.1f} times as long for a layer as the median worker" if checks >= CHECKS else None
        if checks != blocks[index].slow_checks or slow != blocks[index].slow:
            blocks[index] = replace(blocks[index], slow_checks=checks, slow=slow)
    state = replace(state, blocks=tuple(blocks))
    moved = [block for block in blocks if block.slow is not None and _may_move(block, state)]
    return state, moved[:1]  # one at a time: there may be room for one alone


def _may_move(block: BlockStatus, state: CoordinatorState) -> bool:
    """Whether to move it: asked for, not done before, it does not leave anyway, and another node has room for it."""
    if not state.policy.move_slow or block.slow_on is not None or block.leaving is not None or not block.node_id:
        return False
    avoid = state.avoided() | {block.node_id}
    return state.slots_outside(avoid) - state.live_outside(avoid) >= block.seats
