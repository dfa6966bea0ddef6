"""A run's figures among the metrics that Ray's nodes export for Prometheus, one time series a block.

Ray puts `ray_` before each name. `cluster/grafana-dashboard.json` shows them.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from ray.util.metrics import Gauge

from dbtrain.monitoring.plain_text import without_keys
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.state import BlockState, BlockStatus

TAGS = ("run", "name", "block")
"""Of every gauge: the run directory, the run's name, and the block's number."""

_STATES = ", ".join(f"{number} {state}" for number, state in enumerate(BlockState))
GAUGES = {
    "dbtrain_step": "Steps that are done",
    "dbtrain_steps": "Steps there are to train",
    "dbtrain_loss": "Mean loss since the report before",
    "dbtrain_samples_per_second": "Samples a second since the report before; 0 without a worker",
    "dbtrain_checkpoint_step": "Newest step that is durably saved",
    "dbtrain_restarts": "New workers after ones that were lost, in this start of the run",
    "dbtrain_rollbacks": "Returns to a checkpoint because values were not finite",
    "dbtrain_workers": "Workers it has now",
    "dbtrain_state": f"Which state it is in: {_STATES}",
}

_log = logging.getLogger(__name__)


class RayMetrics:
    """A `Watcher` that sets gauges. If that fails it says so once, and does nothing from there on."""

    def __init__(self) -> None:
        self._seen: dict[int, BlockStatus] = {}
        self._broken = False
        self._gauges: dict[str, Any] = {}

    def update(self, snapshot: Snapshot) -> None:
        """Take over what has changed."""
        if self._broken:
            return
        try:
            if not self._gauges:
                self._gauges = {name: Gauge(name, text, TAGS) for name, text in GAUGES.items()}
            for block in snapshot.blocks:
                if self._seen.get(block.index) is not block:
                    self._seen[block.index] = block
                    self._tell(snapshot, block)
        except Exception as error:
            # Metrics shall not fail a run, whatever Ray makes of them.
            self._broken = True
            _log.warning(
                "no more metrics for Prometheus, training is not affected: %s: %s", type(error).__name__, error
            )

    def _tell(self, snapshot: Snapshot, block: BlockStatus) -> None:
        tags = dict(zip(TAGS, (without_keys(snapshot.run), snapshot.plan.name, str(block.index)), strict=True))
        running = block.state is BlockState.RUNNING
        for name, value in (
            ("dbtrain_step", block.step),
            ("dbtrain_steps", snapshot.plan.steps),
            ("dbtrain_loss", block.loss),
            ("dbtrain_samples_per_second", block.samples_per_second if running else 0.0),
            ("dbtrain_checkpoint_step", block.checkpoint_step),
            ("dbtrain_restarts", block.restarts),
            ("dbtrain_rollbacks", block.rollbacks),
            ("dbtrain_workers", block.seats if running else 0),
            ("dbtrain_state", list(BlockState).index(block.state)),
        ):
            if math.isfinite(value):
                self._gauges[name].set(value, tags)
