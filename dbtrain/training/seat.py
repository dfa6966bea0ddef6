"""Which of a block's workers a process is, and where it meets the others, if there are any."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Seat:
    """A worker's place in its block. The default is that of a worker who is alone and trains to the end."""

    replica: int = 0
    """Number of this worker among the replicas of its block; replica 0 writes checkpoints and metrics."""
    replicas: int = 1
    """How many workers train the block together."""
    meeting: str | None = None
    """host:port of the run's store, where workers that have to talk find each other; None where nobody has to."""
    until: int | None = None
    """Step after which to leave although training is not over, with the next checkpoint that is due."""
