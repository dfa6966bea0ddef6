"""A run as the page gets it: one JSON object, small however long the run is and however many blocks it has."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from dbtrain.config import RunConfig
from dbtrain.model_config import MaskedLMConfig
from dbtrain.monitoring.curve import Curve
from dbtrain.monitoring.plain_text import without_keys
from dbtrain.monitoring.run_view import BlockView, Mark, Notice, RunView
from dbtrain.orchestration.state import BlockState
from dbtrain.plan import BlockPlan

NOTICES = 200
"""The newest ones are told."""
MARKS = 100
"""Of a block, the newest ones."""
_POINTS = 400
"""Of a curve, at most."""
_ALL_POINTS = 24_000
"""Of all curves together: some hundred kilobytes."""
_TEXT = 500
"""Characters of a reason."""


def encode_state(view: RunView, config: RunConfig, now: float, **more: Any) -> bytes:
    """The JSON object of a run at `now`, seconds since 1970, with the entries of `more`.

    What is not finite becomes null.
    """
    points = max(2, min(_POINTS, _ALL_POINTS // (2 * len(view.blocks))))
    state: dict[str, Any] = {
        "now": now,
        "run": _run(view, config),
        "blocks": [_block(view, block, points) for block in view.blocks],
        "notices": [_notice(notice) for notice in view.notices[-NOTICES:]],
        **more,
    }
    return json.dumps(_plain(state), allow_nan=False, separators=(",", ":")).encode()


def _run(view: RunView, config: RunConfig) -> dict[str, Any]:
    masked = isinstance(config.model, MaskedLMConfig)
    running = [block for block in view.blocks if block.running]
    return {
        "name": view.name,
        "uri": view.uri,
        "kind": view.kind,
        "family": config.model.family,
        "noise": "mask" if masked else "sigma",
        "state": view.state,
        "starts": view.starts,
        "started_at": view.started_at,
        "ended_at": view.ended_at,
        "heard_at": view.heard_at,
        "backend": view.backend,
        "slots": view.slots,
        "nodes": view.nodes,
        "driver": view.driver,
        "fraction": view.fraction,
        "seconds_left": view.all_seconds_left,
        "samples_per_second": _total(block.samples_per_second for block in running),
        "flops_per_second": _total(block.flops_per_second for block in running),
        "restarts": sum(block.restarts for block in view.blocks),
        "rollbacks": sum(block.rollbacks for block in view.blocks),
    }


def _block(view: RunView, block: BlockView, points: int) -> dict[str, Any]:
    layout = block.layout
    return {
        "index": block.index,
        "layers": [layout.layers[0], layout.layers[1] - 1],
        "noise": _range(layout),
        "parameters": layout.parameters,
        "state": _state(block),
        "attempt": block.attempt,
        "restarts": block.restarts,
        "rollbacks": block.rollbacks,
        "replicas": block.replicas,
        "node": block.node,
        "device": block.device,
        "pid": block.pid,
        "step": block.step,
        "total": block.total,
        "loss": block.loss,
        "samples_per_second": block.samples_per_second if block.running else None,
        "flops_per_second": block.flops_per_second if block.running else None,
        "peak_memory": block.peak_memory,
        "checkpoint_step": block.checkpoint_step,
        "checkpoint_at": block.checkpoint_at,
        "heard_at": block.heard_at,
        "reason": None if block.reason is None else _short(block.reason),
        "seconds_left": view.seconds_left(block),
        "losses": _curve(block.losses, points),
        "rates": _curve(block.rates, points),
        "marks": [_mark(mark) for mark in block.marks[-MARKS:]],
    }


def _state(block: BlockView) -> BlockState:
    """Its state; one that gets a new worker after trouble is still restarting."""
    again = block.state is BlockState.STARTING and block.reason is not None
    return BlockState.RESTARTING if again else block.state


def _range(layout: BlockPlan) -> list[float] | None:
    return None if layout.noise is None else [layout.noise.low, layout.noise.high]


def _curve(curve: Curve, points: int) -> dict[str, Any]:
    steps, values = curve.thinned(points)
    return {"steps": steps, "values": values}


def _mark(mark: Mark) -> dict[str, Any]:
    return {"time": mark.time, "step": mark.step, "kind": mark.kind, "text": _short(mark.text)}


def _notice(notice: Notice) -> dict[str, Any]:
    return {"time": notice.time, "kind": notice.kind, "block": notice.block, "text": _short(notice.text)}


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def _total(rates: Iterable[float]) -> float:
    return math.fsum(rate for rate in rates if math.isfinite(rate))


def _plain(value: Any) -> Any:
    """Numbers to 6 significant digits, times and counts as they are, null for what JSON cannot say, and
    no keys in addresses."""
    if isinstance(value, str):
        return without_keys(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if abs(value) >= 1e6 else float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
