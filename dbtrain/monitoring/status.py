"""A run at one moment: as lines for people, and as an object for programs."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from dbtrain.monitoring.columns import Look, table_lines
from dbtrain.monitoring.overview import head_lines, troubles
from dbtrain.monitoring.run_view import BlockView, RunView


def status_lines(look: Look, width: int | None) -> list[Text]:
    """How the run stands, its blocks, and what is wrong; the table fits into `width` cells if there is a width."""
    titles, rows = table_lines(look.view.blocks, look, width)
    titles.stylize("underline")
    for row in rows:
        row.rstrip()
    wrong = [Text(line, style="yellow") for line in troubles(look.view, look.now)]
    return [*head_lines(look), Text(), titles, *rows, *([Text(), *wrong] if wrong else [])]


def status_object(view: RunView, now: float) -> dict[str, Any]:
    """What a program may want to know. Times are seconds since 1970; NaN and infinity stand for what is not known."""
    return {
        "run": view.uri,
        "name": view.name,
        "kind": view.kind,
        "state": view.state.value,
        "starts": view.starts,
        "first_started_at": view.first_started_at,
        "started_at": view.started_at,
        "ended_at": view.ended_at,
        "heard_at": view.heard_at,
        "driver": view.driver if view.starts else None,
        "backend": view.backend if view.starts else None,
        "slots": view.slots,
        "nodes": view.nodes,
        "batch_size": view.batch_size,
        "fraction": view.fraction,
        "seconds_left": view.all_seconds_left,
        "troubles": troubles(view, now),
        "blocks": [_block(view, block) for block in view.blocks],
    }


def _block(view: RunView, block: BlockView) -> dict[str, Any]:
    noise = block.layout.noise
    return {
        "index": block.index,
        "layers": list(block.layout.layers),
        "noise": None if noise is None else noise.model_dump(),
        "state": block.state.value,
        "attempt": block.attempt,
        "restarts": block.restarts,
        "rollbacks": block.rollbacks,
        "replicas": block.replicas,
        "pid": block.pid,
        "node": block.node,
        "device": block.device,
        "step": block.step,
        "steps": block.total,
        "loss": block.loss,
        "grad_norm": block.grad_norm,
        "lr": block.lr,
        "samples_per_second": block.samples_per_second,
        "flops_per_second": block.flops_per_second,
        "peak_memory": block.peak_memory,
        "checkpoint_step": block.checkpoint_step,
        "checkpoint_at": block.checkpoint_at,
        "heard_at": block.heard_at,
        "seconds_left": view.seconds_left(block),
        "reason": block.reason,
    }
