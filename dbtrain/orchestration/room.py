"""Who gets room: which waiting blocks start now, and which workers make way for others."""

from __future__ import annotations

from dataclasses import replace

from dbtrain.orchestration.events import StartWorker, StopWorker
from dbtrain.orchestration.state import (
    ENDED,
    FAILURES_OF_A_NODE,
    WAITING,
    BlockState,
    BlockStatus,
    CoordinatorState,
)


class _Room:
    """The room that is left in a state while workers are added to it."""

    def __init__(self, state: CoordinatorState):
        self._state = state
        self._bad_nodes = state.avoided()
        self._worse_nodes = state.avoided(FAILURES_OF_A_NODE + 1)
        self._free = state.slots - state.live
        self._taken = 0
        self._fits: dict[frozenset[str], int] = {}
        self._outside: dict[frozenset[str], int] = {}

    def fits(self, avoid: frozenset[str]) -> int:
        """Workers that may train at once outside some nodes."""
        if avoid not in self._fits:
            self._fits[avoid] = self._state.slots_outside(avoid)
        return self._fits[avoid]

    def left(self, avoid: frozenset[str] = frozenset()) -> int:
        """Workers that can still be added outside some nodes."""
        if avoid not in self._outside:
            self._outside[avoid] = self.fits(avoid) - self._state.live_outside(avoid)
        return min(self._free, self._outside[avoid]) - self._taken

    def take(self, workers: int) -> None:
        """Add workers, wherever they go: until they answer, they could be on any node."""
        self._taken += workers

    def place(self, block: BlockStatus) -> tuple[int, frozenset[str]]:
        """How many workers the block gets when there is room, and outside which nodes."""
        # Where good nodes are full, a slow one will do, and a bad one gets one more chance: it may have been blamed for
        # what was not its fault. Else a node that is avoided is better than none, but not better than to wait.
        slow = self._bad_nodes if block.slow_on is None else self._bad_nodes | {block.slow_on}
        for nodes in (slow, self._bad_nodes, self._worse_nodes):
            seats = _seats(block.replicas, self.fits(nodes))
            if self.fits(nodes) > 0 and seats <= self.left(nodes):
                return seats, nodes
        avoid = next(
            (nodes for nodes in (self._bad_nodes, self._worse_nodes) if self.fits(nodes) > 0), frozenset[str]()
        )
        return _seats(block.replicas, self.fits(avoid)), avoid

    def slice_steps(self) -> int | None:
        """Steps of a time slice; None where blocks keep their workers, because nothing else is asked or all fit."""
        if self._state.policy.slice_steps is None:
            return None
        wanted = sum(block.replicas for block in self._state.blocks if block.state not in ENDED)
        return self._state.policy.slice_steps if wanted > (self.fits(self._bad_nodes) or self._state.slots) else None


def give_room(state: CoordinatorState, time: float) -> tuple[CoordinatorState, tuple[StartWorker, ...]]:
    """Start blocks that wait as long as there is room; those in their back-off are passed over."""
    if state.stopping:
        return state, ()
    ready = [block for index in state.order if _is_ready(block := state.blocks[index], time)]
    if not ready:
        return state, ()
    room = _Room(state)
    if room.left() < 1:
        return state, ()
    slice_steps = room.slice_steps()
    # Those who lag first, then as in `order`. Without time slices what is begun comes before what is not.
    turns = state.policy.slice_steps is not None
    ready.sort(key=lambda block: (not turns and block.attempt == 0, block.step))
    actions: list[StartWorker] = []
    lags: int | None = None  # step of the first block that is too large for the room there is
    for block in ready:
        if room.left() < 1 or (slice_steps is not None and lags is not None and block.step > lags):
            # Blocks that take turns do not overtake one that needs several workers: it would never get them together.
            break
        seats, avoid = room.place(block)
        if seats > room.left(avoid):
            lags = block.step if lags is None else lags
            continue
        room.take(seats)
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
        state = state.put(started)
        actions.append(StartWorker(block.index, started.attempt, seats, started.until, avoid))
    return state, tuple(actions)


def make_way(state: CoordinatorState, time: float) -> tuple[CoordinatorState, tuple[StopWorker, ...]]:
    """Ask workers to leave for whom others have waited a time slice, and small groups that can be whole again."""
    if state.stopping:
        return state, ()
    asked = _had_their_turn(state, time) or _can_grow(state)
    for block, reason in asked:
        state = state.put(replace(block, leaving=reason))
    return state, tuple(StopWorker(block.index, block.attempt) for block, _ in asked)


def _had_their_turn(state: CoordinatorState, time: float) -> list[tuple[BlockStatus, str]]:
    """Blocks that started when there was room for all, and now train while others wait who lag by a time slice."""
    ready = [block for block in state.blocks if _is_ready(block, time)]
    if not ready or state.policy.slice_steps is None:
        return []
    room = _Room(state)
    slice_steps = room.slice_steps()
    if slice_steps is None:
        return []
    behind = min(block.step for block in ready)
    needed = sum(room.place(block)[0] for block in ready)
    needed -= sum(block.seats for block in state.blocks if block.leaving is not None)
    ahead = [b for b in state.blocks if _is_settled(b) and b.until is None and b.step >= behind + slice_steps]
    found = []
    for block in sorted(ahead, key=lambda block: block.step, reverse=True):
        if needed <= 0:
            break
        needed -= block.seats
        found.append((block, "others have waited for a time slice"))
    return found


def _can_grow(state: CoordinatorState) -> list[tuple[BlockStatus, str]]:
    """Groups that lack workers since a node has left, once nobody else wants the room that there is again."""
    small = [block for block in state.blocks if block.seats < block.replicas and _is_settled(block)]
    if not small or any(block.state in WAITING for block in state.blocks):
        return []
    room, found = _Room(state), []
    for block in small:
        seats, avoid = room.place(block)
        if block.node_id not in avoid and 0 < seats - block.seats <= room.left(avoid):
            room.take(seats - block.seats)
            found.append((block, f"there is room for {seats} workers again"))
    return found


def _is_ready(block: BlockStatus, time: float) -> bool:
    return block.state in WAITING and (block.state is not BlockState.RESTARTING or time >= block.retry_at)


def _is_settled(block: BlockStatus) -> bool:
    return block.state is BlockState.RUNNING and block.leaving is None


def _seats(replicas: int, room: int) -> int:
    """As many workers as wanted, or where nodes have left, the largest part of them that divides a batch as well."""
    return next(seats for seats in range(replicas, 0, -1) if seats <= max(room, 1) and not replicas % seats)
