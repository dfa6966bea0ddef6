"""A block's metrics.jsonl as its one writer sees it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from dbtrain.errors import NoRoom
from dbtrain.run_directory import BlockDirectory

_log = logging.getLogger(__name__)


class MetricsLog:
    """Appends lines, unless a newer attempt owns the block. A full disk holds lines back, and training does not wait.

    (It waits at its next checkpoint, which finds no room either.)
    """

    def __init__(self, block: BlockDirectory, attempt: int):
        self._block = block
        self._attempt = attempt
        self._held: list[Mapping[str, Any]] = []

    def tell(
        self,
        *,
        step: int,
        samples: int,
        loss: float,
        grad_norm: float,
        lr: float,
        samples_per_second: float,
        skipped: int,
        checkpoint_step: int,
        peak_memory: int,
        stem: Mapping[str, Any],
    ) -> None:
        """A line of measurements after `step` finished steps, `samples` samples.

        Args:
            loss: mean over the steps since the line before.
            grad_norm: of the last step, before clipping.
            lr: of the last step.
            samples_per_second: since the line before.
            skipped: steps in a row, up to this one, that changed nothing because values were infinite or NaN.
            checkpoint_step: newest durable step at this time: what a death would cost is counted from there.
            peak_memory: bytes that the worker has held at once, at most, see `dbtrain.training.memory`.
            stem: what there is to say of an averaged stem, by name.

        Raises:
            StaleAttempt: a newer attempt owns the block; nothing was written.
            UserError: the file cannot be written, for another reason than a full disk.
        """
        self._write(
            {
                "step": step,
                "samples": samples,
                # JSON has no word for NaN and infinity.
                "loss": loss if math.isfinite(loss) else None,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "lr": lr,
                "samples_per_second": samples_per_second,
                "skipped": skipped,
                "checkpoint_step": checkpoint_step,
                "peak_memory": peak_memory,
                "attempt": self._attempt,
                **stem,
            }
        )

    def rolled_back(self, step: int, *, from_step: int, reason: str) -> None:
        """A line that says that training went back from `from_step` to `step`. Raises as `tell` does."""
        self._write(
            {"event": "rolled_back", "step": step, "from_step": from_step, "reason": reason, "attempt": self._attempt}
        )

    def close(self) -> None:
        """Write what is held back, or say that it is lost: nothing depends on it. Raises as `tell` does."""
        if not self._held:
            return
        self._flush()
        if self._held:
            _log.warning("no room for the last %d lines of %s", len(self._held), self._block.metrics_uri)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._held.append(line)  # behind those that are held back
        self._flush()

    def _flush(self) -> None:
        self._block.check_fence(self._attempt)
        while self._held:
            try:
                self._block.log_metrics(self._held[0])
            except NoRoom:
                return
            del self._held[0]
