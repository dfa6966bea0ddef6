"""What a trainer tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a block's training stands."""

    block: int
    attempt: int
    step: int
    """Finished optimiser steps."""
    total: int
    loss: float
    """Mean training loss since the last report; NaN before the first step."""
    samples_per_second: float
    checkpoint_step: int
    """Step of the newest durable checkpoint, 0 if there is none."""
    done: bool
    """True once the last step is durably saved."""
    trouble: str | None = None
    """What the worker waits for, such as room on a full disk."""
    rollbacks: int = 0
    """How often the block has gone back to a checkpoint because of infinite or NaN values, in all its attempts."""
