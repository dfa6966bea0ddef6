"""Infinite and NaN values: steps passed over, and going back to a checkpoint when that does not help.

Where a block gives up does not depend on when somebody looks, and where it goes back to not on when it was stopped:
both are functions of the steps, so that a disturbed run goes back exactly as an undisturbed one does. After a roll-back
everything random is drawn as for later steps, by an offset that the checkpoints record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_CONSECUTIVE_SKIPS = 20
"""Optimiser steps in a row that may be skipped for a non-finite gradient before the block goes back."""
_MAX_UNCOUNTED = 1024
"""Steps after which the device is waited for although nobody asks how they went."""


class NonFiniteError(RuntimeError):
    """Gradients stayed infinite or NaN for `MAX_CONSECUTIVE_SKIPS` steps, or a parameter became so."""

    def __init__(self, message: str, step: int, well_until: int):
        """`step` is where it is given up; up to step `well_until` all seemed well."""
        super().__init__(message)
        self.step = step
        self.well_until = well_until


class StepGuard:
    """Counts the optimiser steps that are skipped in a row, without waiting for the device at every step."""

    def __init__(self) -> None:
        self._skipped = 0
        self._limit_at: int | None = None
        self._last = 0
        self._judged: list[Tensor] = []  # of the steps up to the last one that are not counted yet

    @property
    def skipped(self) -> int:
        """Steps skipped in a row up to now; waits for the device."""
        self._count()
        return self._skipped

    def judge(self, grad_norm: Tensor, step: int) -> Tensor:
        """1.0 if the optimiser has to skip the step that makes `step` finished ones, else 0.0; on the device."""
        found_inf = (grad_norm * 0.0).ne_(0.0)  # 0 times anything finite is 0; else it is NaN, which differs from 0
        self._judged.append(found_inf)
        self._last = step
        if len(self._judged) == _MAX_UNCOUNTED:
            self._count()
        return found_inf

    def check(self, block: int) -> None:
        """Raise NonFiniteError if the limit has been reached; waits for the device."""
        self._count()
        if self._limit_at is not None:
            limit, step = MAX_CONSECUTIVE_SKIPS, self._limit_at
            message = (
                f"block {block}: gradients were not finite in {limit} steps in a row, up to step {step}; "
                "lower optimiser.lr or set optimiser.clip_norm"
            )
            raise NonFiniteError(message, step, step - limit)

    def reset(self, skipped: int = 0) -> None:
        """Go on from a checkpoint with so many skipped steps behind it."""
        self._skipped, self._limit_at = skipped, None
        self._judged.clear()

    def _count(self) -> None:
        if not self._judged:
            return
        judged = torch.stack(self._judged).tolist()
        self._judged.clear()
        for step, found_inf in enumerate(judged, start=self._last + 1 - len(judged)):
            self._skipped = self._skipped + 1 if found_inf else 0
            # The step at which the limit was first reached; steps that went well after that change nothing.
            if self._skipped >= MAX_CONSECUTIVE_SKIPS and self._limit_at is None:
                self._limit_at = step


def check_weights(model: Mapping[str, Tensor], block: int, step: int) -> None:
    """Raise NonFiniteError if one of the parameters, by name, is not finite."""
    for name, value in model.items():
        if not value.isfinite().all():
            message = f"block {block}: {name} is not finite at step {step}; lower optimiser.lr"
            raise NonFiniteError(message, step, step - 1)


@dataclass(frozen=True)
class Rollback:
    """One return to an earlier step."""

    from_step: int
    to_step: int


class Rollbacks:
    """All of a block's roll-backs, oldest first."""

    def __init__(self) -> None:
        self._done: list[Rollback] = []

    def __len__(self) -> int:
        return len(self._done)

    @property
    def offset(self) -> int:
        """What is added to a step for everything random: the steps that were given up."""
        return sum(rollback.from_step - rollback.to_step for rollback in self._done)

    def add(self, from_step: int, to_step: int) -> None:
        """Remember one more."""
        self._done.append(Rollback(from_step, to_step))

    def to_json(self) -> list[dict[str, int]]:
        """For a checkpoint's state."""
        return [{"from": rollback.from_step, "to": rollback.to_step} for rollback in self._done]

    def restore(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Put back what `to_json` gave."""
        self._done = [Rollback(one["from"], one["to"]) for one in found]
