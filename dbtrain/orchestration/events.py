"""What the coordinator hears (events) and what it wants done (actions).

Times are seconds of one clock that never falls.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    time: float


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the run to stop: workers finish their step, save, and leave."""

    time: float


@dataclass(frozen=True, slots=True)
class ScaleRequested:
    """Somebody wants a block to be trained by another number of workers."""

    time: float
    block: int
    replicas: int


@dataclass(frozen=True, slots=True)
class Node:
    """A machine, or what Ray takes for one."""

    id: str
    slots: int
    """Workers that fit there."""


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """Nodes have joined or left."""

    time: float
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """All workers of the block answer for the first time."""

    time: float
    block: int
    attempt: int
    pid: int
    """Of replica 0, like what follows."""
    node: str
    """Address of the machine."""
    device: str
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class WorkerAlive:
    """All workers of the block answer, and have nothing to tell yet."""

    time: float
    block: int
    attempt: int


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """The workers of a block have done some steps."""

    time: float
    block: int
    attempt: int
    step: int
    loss: float
    samples_per_second: float
    checkpoint_step: int
    trouble: str | None = None
    """What the worker waits for, such as room on a full disk."""
    rollbacks: int = 0
    """How often the block has gone back to a checkpoint because of infinite or NaN values, in all its attempts."""


@dataclass(frozen=True, slots=True)
class WorkerFinished:
    """The block's last step is durably saved, and the worker has left."""

    time: float
    block: int
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """The worker has saved and left because it was asked to, or because its time slice is over."""

    time: float
    block: int
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The process of a worker is gone, through no fault of the code in it."""

    time: float
    block: int
    attempt: int
    reason: str
    node_id: str = ""
    """Where that process was; empty where it is not known."""


@dataclass(frozen=True, slots=True)
class WorkerError:
    """The code in the worker raised, and the worker has left."""

    time: float
    block: int
    attempt: int
    reason: str
    step: int
    """Finished steps when it raised; -1 before the block was built."""
    traceback: str
    rows: tuple[int, ...] = ()
    """Numbers of the rows in the batch of the step that raised."""


WorkerEvent = WorkerStarted | WorkerAlive | WorkerProgress | WorkerFinished | WorkerStopped | WorkerDied | WorkerError
Event = Tick | StopRequested | ScaleRequested | CapacityChanged | WorkerEvent


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker for the block, or several that train it together."""

    block: int
    attempt: int
    replicas: int = 1
    until: int | None = None
    """Step at which to save and leave; None to train to the end."""
    avoid: frozenset[str] = frozenset()
    """Ids of nodes where it shall not go."""


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Ask the workers to finish their step, save and leave."""

    block: int
    attempt: int


@dataclass(frozen=True, slots=True)
class KillWorker:
    """End the workers at once; they are not heard of again."""

    block: int
    attempt: int


Action = StartWorker | StopWorker | KillWorker
