"""Small language models, trained for a moment: what they write is nonsense, and not by accident the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_families import raw_config
from small_runs import start_run, train_all

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config_file import parse_config
from dbtrain.inference.runs import model_of
from dbtrain.plan import Kind

QUICK: dict[str, dict[str, Any]] = {
    "training": {"steps": 10},
    "optimiser": {"lr": 1e-2},
    "chain": {"start_noises": 3},
    "ema": {"half_life": 0},
}


def small_language_model(
    shards: Path, where: Path, kind: Kind = "blocks", **sections: dict[str, Any]
) -> AssembledModel:
    """An assembled causal model on the data in `shards`; keyword arguments extend sections of its configuration."""
    config = parse_config(raw_config("causal_lm", shards, **{**QUICK, **sections}))
    return model_of(train_all(start_run(config, where, kind)))
