from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import start_run, train_all

from dbtrain.assembly.assemble import assemble
from dbtrain.config import RunConfig
from dbtrain.run_directory import RunDirectory


@pytest.fixture(scope="session")
def _finished(small_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_all(start_run(small_config(training={"steps": 20}, checkpoints={"every": 15}), folder))
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> RunDirectory:
    """A trained run of three blocks, not assembled, the test's own."""
    return RunDirectory.open(shutil.copytree(_finished, tmp_path / "run"))


@pytest.fixture
def model(finished: RunDirectory) -> Path:
    """Its model folder."""
    return Path(assemble(finished).path)
