"""Feeding a coordinator events by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dbtrain.orchestration.coordinator import step
from dbtrain.orchestration.events import Action, Event, Node, WorkerProgress, WorkerStarted
from dbtrain.orchestration.state import BlockStatus, CoordinatorState, Policy, initial_state

POLICY = Policy(max_restarts=3, start_timeout=10.0, first_backoff=0.5, longest_backoff=30.0)


def fresh(
    blocks: int | Sequence[BlockStatus],
    slots: int | Mapping[str, int],
    policy: Policy = POLICY,
    order: list[int] | None = None,
    limit: int | None = None,
) -> CoordinatorState:
    """A run before its first event: so many blocks, and one node `n` or several with so many slots each."""
    statuses = [BlockStatus(index) for index in range(blocks)] if isinstance(blocks, int) else blocks
    nodes = nodes_of({"n": slots} if isinstance(slots, int) else slots)
    return initial_state(statuses, nodes=nodes, policy=policy, order=order, limit=limit)


def nodes_of(slots: Mapping[str, int]) -> tuple[Node, ...]:
    """Nodes by their ids."""
    return tuple(Node(name, count) for name, count in slots.items())


def feed(state: CoordinatorState, *events: Event) -> tuple[CoordinatorState, list[Action]]:
    """The state after some events, and all that was to be done."""
    actions: list[Action] = []
    for event in events:
        state, new = step(state, event)
        actions += new
    return state, actions


def started(time: float, block: int, attempt: int, node: str = "n") -> WorkerStarted:
    """The workers of a block answer from a node."""
    return WorkerStarted(time, block, attempt, pid=100 + block, node=node, device="cpu", node_id=node)


def progress(
    time: float,
    block: int,
    attempt: int,
    step: int,
    checkpoint: int = 0,
    speed: float = 100.0,
    trouble: str | None = None,
) -> WorkerProgress:
    """The workers of a block have done steps, at `speed` samples a second."""
    return WorkerProgress(time, block, attempt, step, 0.5, speed, checkpoint, trouble)


def states(state: CoordinatorState) -> list[str]:
    """Where each block stands."""
    return [block.state.value for block in state.blocks]
