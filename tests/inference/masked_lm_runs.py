"""Small runs of the masked language model, for the tests of what it writes and how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_runs import start_run, train_all

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import RunConfig
from dbtrain.inference.runs import model_of
from dbtrain.plan import Kind

LENGTH = 32
"""Tokens in a window."""
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"depth": 3, "width": 32, "mlp_width": 64},
    "training": {"batch_size": 32},
    "optimiser": {"lr": 5e-3},
    "chain": {"steps": 12},
}
"""For `family_config`: enough training to write letters and spaces, in a second."""


def trained_model(config: RunConfig, where: Path, kind: Kind = "blocks") -> AssembledModel:
    """The assembled model of a run trained to its end."""
    return model_of(train_all(start_run(config, where, kind)))
