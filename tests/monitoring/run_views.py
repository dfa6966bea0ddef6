"""Runs as their readers see them, made by hand."""

from __future__ import annotations

from typing import Any

from dbtrain.monitoring.columns import Look
from dbtrain.monitoring.run_view import BlockView, Notice, RunState, RunView
from dbtrain.monitoring.sparkline import UNICODE, Glyphs
from dbtrain.orchestration.state import BlockState
from dbtrain.plan import BlockPlan, Bytes, NoiseRange

NOW = 1_700_000_000.0
NO_BYTES = Bytes(parameters=0, buffers=0, gradients=0, optimiser=0, ema=0, activations=0)


def metrics_line(step: int, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl as `recent` has it."""
    line = {"time": NOW - 1, "step": step, "loss": loss, "grad_norm": 0.5, "lr": 1e-3, "samples_per_second": 50.0}
    return line | more


def block_view(index: int, **fields: Any) -> BlockView:
    """A block that runs at step 400 of 1000; `fields` are set afterwards."""
    noise = NoiseRange(low=0.5, high=80.0)
    layout = BlockPlan(
        index=index,
        layers=(2 * index, 2 * index + 2),
        noise=noise,
        trained=noise,
        parameters=1,
        bytes=NO_BYTES,
        evaluations=1,
        flops_per_sample=25_000_000_000,
    )
    block = BlockView(layout, total=1000, state=BlockState.RUNNING, attempt=1, step=400, loss=0.1234)
    block.pid, block.node, block.device = 4711 + index, "10.0.0.3", "cuda:1"
    block.samples_per_second, block.peak_memory = 48.0, 412_300_000
    block.checkpoint_step, block.checkpoint_at, block.heard_at = 300, NOW - 95, NOW - 2
    for step, loss in ((100, 0.9), (200, 0.5), (300, 0.2), (400, 0.1234)):
        block.losses.add(step, loss)
    for name, value in fields.items():
        setattr(block, name, value)
    return block


def run_view(*blocks: BlockView, **fields: Any) -> RunView:
    """A run of them that began two minutes ago."""
    view = RunView("/runs/a", "demo", "blocks", 64, list(blocks), state=RunState.RUNNING, starts=1)
    view.started_at = view.first_started_at = NOW - 120
    view.backend, view.slots, view.driver = "ray", 2, "process 71 on host"
    view.notices = [Notice(NOW - 100, "block_running", 0, "running at step 0")]
    for name, value in fields.items():
        setattr(view, name, value)
    return view


def look(view: RunView, glyphs: Glyphs = UNICODE) -> Look:
    """At it, now."""
    return Look(view, NOW, glyphs)
