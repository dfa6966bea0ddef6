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
class WorkerStarted:
    """A worker answers for the first time."""

    time: float
    block: int
    attempt: int
    pid: int
    node: str
    """Address of the machine."""
    device: str


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """A worker has done some steps."""

    time: float
    block: int
    attempt: int
    step: int
    loss: float
    samples_per_second: float
    checkpoint_step: int


@dataclass(frozen=True, slots=True)
class WorkerFinished:
    """The block's last step is durably saved, and the worker has left."""

    time: float
    block: int
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """The worker has saved and left because it was asked to."""

    time: float
    block: int
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The worker's process is gone, through no fault of the code in it."""

    time: float
    block: int
    attempt: int
    reason: str


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


WorkerEvent = WorkerStarted | WorkerProgress | WorkerFinished | WorkerStopped | WorkerDied | WorkerError
Event = Tick | StopRequested | WorkerEvent


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker for the block."""

    block: int
    attempt: int


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Ask the worker to finish its step, save and leave."""

    block: int
    attempt: int


@dataclass(frozen=True, slots=True)
class KillWorker:
    """End the worker at once; it is not heard of again."""

    block: int
    attempt: int


Action = StartWorker | StopWorker | KillWorker
