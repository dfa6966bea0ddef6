"""What the coordinator knows: of every block, of the nodes, and of when to give up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from dbtrain.orchestration.events import Node


class BlockState(StrEnum):
    """Where a block stands."""

    PENDING = "pending"
    """Waits for its first worker."""
    STARTING = "starting"
    """A worker is asked for and has not answered yet."""
    RUNNING = "running"
    """A worker trains it."""
    PAUSED = "paused"
    """Has saved and left, at the end of a time slice or to go elsewhere; the next worker starts when there is room."""
    RESTARTING = "restarting"
    """Its worker is gone; a new one starts when the back-off is over and there is room."""
    FINISHED = "finished"
    """The last step is durably saved."""
    FAILED = "failed"
    """Given up, with a reason."""
    STOPPED = "stopped"
    """Left on request; starting the run again goes on from its checkpoint."""


LIVE = frozenset({BlockState.STARTING, BlockState.RUNNING})
"""States in which a block has workers."""
WAITING = frozenset({BlockState.PENDING, BlockState.PAUSED, BlockState.RESTARTING})
"""States in which a block wants workers."""
ENDED = frozenset({BlockState.FINISHED, BlockState.FAILED, BlockState.STOPPED})
"""States that a block does not leave."""

FAILURES_OF_A_NODE = 2
"""A node on which a block lost its worker so often is avoided by all blocks while others have room; once more, and it
is avoided while there are others."""


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """All that is known of one block."""

    index: int
    state: BlockState = BlockState.PENDING
    replicas: int = 1
    """Workers it is to have."""
    cost: float = 1.0
    """Layers evaluated for one sample: blocks of more layers may take longer for it."""
    attempt: int = 0
    """The newest attempt; 0 before the first."""
    restarts: int = 0
    """New workers after ones that were lost, in this start of the run."""
    failures: int = 0
    """Workers lost in a row without a new checkpoint in between."""
    since: float = 0.0
    """When the state was entered, seconds."""
    retry_at: float = 0.0
    """In state restarting: the end of the back-off, seconds."""
    reason: str | None = None
    """The newest trouble."""
    error_step: int | None = None
    """Step at which the code raised most recently."""
    failed_on: tuple[str, ...] = ()
    """Ids of the nodes where it lost a worker, once for each time."""

    step: int = 0
    loss: float = float("nan")
    samples_per_second: float = 0.0
    checkpoint_step: int = 0
    rollbacks: int = 0

    seats: int = 0
    """Workers it has now."""
    until: int | None = None
    """Step at which the time slice of the workers it has ends."""
    base_step: int = 0
    """Newest checkpoint when they were started."""
    heard_at: float = 0.0
    """When all of them last answered, seconds."""
    moved_at: float = 0.0
    """When they last told a new step, seconds."""
    reported: bool = False
    """Whether they have told any step yet: the block is built."""
    leaving: str | None = None
    """Why the coordinator has asked them to leave."""
    trouble: str | None = None
    """What they wait for, such as room on a full disk."""
    slow_checks: int = 0
    """How often in a row they were found to be slow."""
    slow: str | None = None
    """How slow, once that is certain."""
    slow_on: str | None = None
    """Id of the node from which the block has been moved away."""
    pid: int | None = None
    node: str | None = None
    node_id: str = ""
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """When to try again and when to give up."""

    max_restarts: int = 5
    """Restarts in a row without a new checkpoint before a block counts as failed."""
    start_timeout: float = 120.0
    """Seconds workers may take to answer for the first time; after that they count as dead."""
    heartbeat_timeout: float = 60.0
    """Seconds workers may leave a question unanswered."""
    step_timeout: float = 1800.0
    """Seconds without a new step."""
    first_backoff: float = 0.5
    """Seconds before the first restart of a block; doubled for each further one."""
    longest_backoff: float = 30.0
    """Where the doubling ends, seconds."""
    slice_steps: int | None = None
    """Steps of a time slice while there is not room for all blocks; None to let a block keep its workers."""
    slow_factor: float = 3.0
    """Workers are slow that take this many times the median for a layer."""
    move_slow: bool = False
    """Move them to another node, once."""

    def backoff(self, failures: int) -> float:
        """Seconds to wait after `failures` earlier failures in a row."""
        return min(self.first_backoff * 2.0 ** min(failures, 60), self.longest_backoff)


@dataclass(frozen=True, slots=True)
class CoordinatorState:
    """The whole state of a run: everything a decision depends on."""

    blocks: tuple[BlockStatus, ...]
    order: tuple[int, ...]
    """Blocks in the order in which they get room at first; those who have begun and lag come before others."""
    nodes: tuple[Node, ...]
    policy: Policy
    limit: int | None = None
    """Workers that may train at once, however many fit; None for no limit."""
    stopping: bool = False
    weighed_at: float = 0.0
    """When workers were last compared with each other, seconds."""

    @property
    def done(self) -> bool:
        """Every block has ended."""
        return all(block.state in ENDED for block in self.blocks)

    @property
    def slots(self) -> int:
        """Workers that may train at once."""
        return self.slots_outside(frozenset())

    @property
    def live(self) -> int:
        """Workers that there are now."""
        return sum(block.seats for block in self.blocks if block.state in LIVE)

    def slots_outside(self, avoid: frozenset[str]) -> int:
        """Workers that may train at once outside some nodes."""
        fit = sum(node.slots for node in self.nodes if node.id not in avoid)
        return fit if self.limit is None else min(fit, self.limit)

    def live_outside(self, avoid: frozenset[str]) -> int:
        """Workers that there are now outside some nodes, at most.

        Those that have not answered could be anywhere, and so could all of a group but the first.
        """
        return sum(b.seats - (b.node_id in avoid) for b in self.blocks if b.state in LIVE)

    def put(self, block: BlockStatus) -> CoordinatorState:
        """The state with another status of one block."""
        blocks = list(self.blocks)
        blocks[block.index] = block
        return replace(self, blocks=tuple(blocks))

    def avoided(self, failures: int = FAILURES_OF_A_NODE) -> frozenset[str]:
        """Nodes on which one and the same block lost its worker so often."""
        # Several blocks that lost one each say less: that is how it looks when a raylet dies.
        return frozenset(
            node
            for block in self.blocks
            if len(block.failed_on) >= failures
            for node, times in Counter(block.failed_on).items()
            if times >= failures
        )


def initial_state(
    blocks: Iterable[BlockStatus],
    *,
    nodes: Sequence[Node],
    policy: Policy,
    order: Sequence[int] | None = None,
    limit: int | None = None,
) -> CoordinatorState:
    """The state before the first event. Blocks of an earlier start come in as finished or pending.

    Raises:
        ValueError: `order` is not a permutation of the blocks, or there is room for no worker.
    """
    statuses = tuple(blocks)
    wanted = tuple(range(len(statuses))) if order is None else tuple(order)
    if sorted(wanted) != list(range(len(statuses))):
        raise ValueError(f"order {list(wanted)} does not name each of {len(statuses)} blocks once")
    if [status.index for status in statuses] != list(range(len(statuses))):
        raise ValueError("blocks have to come in the order of their indices")
    state = CoordinatorState(statuses, wanted, tuple(nodes), policy, limit)
    if state.slots < 1:
        raise ValueError("a run needs room for at least one worker")
    return state
