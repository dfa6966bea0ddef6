"""A small network of every family, on data that comes with a dependency, for tests that run over all of them."""

from __future__ import annotations

from typing import Any

IMAGES: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 10, "patch_size": 4, "mlp_width": 32}
TEXT: dict[str, Any] = {"length": 32, "vocab_size": 257, "mlp_width": 32}
WIDTHS: dict[str, Any] = {"depth": 4, "width": 16, "heads": 2}

MODELS: dict[str, dict[str, Any]] = {
    "vit": {**WIDTHS, **IMAGES, "dropout": 0.1},
    "dit": {**WIDTHS, **IMAGES},
    "causal_lm": {**WIDTHS, **TEXT, "kv_heads": 1},
    "recurrent_lm": {**WIDTHS, **TEXT},
    "masked_lm": {**WIDTHS, **TEXT},
}


def is_text(family: str) -> bool:
    """Whether the family trains on text."""
    return "length" in MODELS[family]


def raw_config(family: str, data: object, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """Plain data of a run on the shards in the folder `data`; keyword arguments extend sections."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"family": family, **MODELS[family]},
        "data": {"source": "topics" if is_text(family) else "digits", "path": str(data)},
        "blocks": {"count": 3},
        "chain": {} if family in ("vit", "causal_lm") else {"steps": 4},
        "training": {"steps": 60, "batch_size": 16},
        "ema": {"half_life": 200},
        "checkpoints": {"every": 20},
        "logging": {"every": 10},
        "resources": {"cpus": 0.25, "threads": 1},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return {"name": f"small-{family}", "seed": 7, **raw}
