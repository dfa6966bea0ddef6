from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbtrain.config import RunConfig
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import read_weights

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def make_config(small_config: MakeConfig) -> MakeConfig:
    """A tiny run of three single-layer blocks; keyword arguments replace fields of its sections."""
    tiny: dict[str, dict[str, Any]] = {
        "model": {"depth": 3, "dropout": 0.0},
        "data": {"augment": {"crop_padding": 0}},
        "training": {"steps": 30},
        "ema": {"half_life": 0},
        "checkpoints": {"every": 10},
        "logging": {"every": 5},
        "resources": {"cpus": 0.5},
    }

    def make(**sections: dict[str, Any]) -> RunConfig:
        names = tiny.keys() | sections.keys()
        return small_config(**{name: {**tiny.get(name, {}), **sections.get(name, {})} for name in names})

    return make


def weights_digest(run_path: Path) -> str:
    """One digest of all blocks' trained parameters."""
    run = RunDirectory.open(run_path)
    digest = hashlib.sha256()
    for block in run.plan.blocks:
        step, tensors = read_weights(run.block(block.index), "raw")
        assert step == run.plan.steps
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def digest_of() -> Callable[[Path], str]:
    return weights_digest
