from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from small_runs import start_run, train_all

import dbtrain
from dbtrain.config import RunConfig
from dbtrain.data.shards import ShardSet
from dbtrain.inference.classify import Classifier
from dbtrain.inference.runs import model_of
from dbtrain.run_directory import RunDirectory


@pytest.fixture(scope="session")
def trained(small_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """An assembled run of three blocks; read only."""
    config = small_config(
        model={"dropout": 0.0},
        noise={"p_mean": 1.5},
        training={"steps": 120, "batch_size": 64},
        optimiser={"lr": 5e-3},
        chain={"start_noises": 3, "readout": "first_mean"},
    )
    run = train_all(start_run(config, tmp_path_factory.mktemp("runs") / "blocks"))
    model_of(run)
    return run


@pytest.fixture(scope="session")
def baseline(small_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """An assembled end-to-end run; read only."""
    config = small_config(training={"steps": 20})
    run = train_all(start_run(config, tmp_path_factory.mktemp("runs") / "baseline", "end_to_end"))
    model_of(run)
    return run


@pytest.fixture
def own_run(trained: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of the run that a test may change."""
    return RunDirectory.open(shutil.copytree(trained.uri, tmp_path / "run"))


@pytest.fixture(scope="session")
def classifier(trained: RunDirectory) -> Classifier:
    front = dbtrain.load(trained.uri)
    assert isinstance(front, Classifier)
    return front


@pytest.fixture(scope="session")
def pictures(digits: Path) -> npt.NDArray[np.uint8]:
    """The first test images, (12, 8, 8)."""
    shards = ShardSet.open(digits, "test")
    images: npt.NDArray[np.uint8] = shards.gather("image", np.arange(12))[:, 0]
    return images
