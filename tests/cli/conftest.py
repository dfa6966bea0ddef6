"""A small recipe as a file, and runs trained from it, by the command itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import dbtrain

from dbtrain.config import RunConfig


@pytest.fixture(scope="session")
def recipe(small_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a run of three blocks that trains in a second."""
    config = small_config(training={"steps": 20}, checkpoints={"every": 10}, chain={"start_noises": 2})
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(config.to_yaml())
    return path


@pytest.fixture(scope="session")
def trained_runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished `run` and its `baseline`, both assembled and evaluated; nobody writes there."""
    folder = tmp_path_factory.mktemp("trained")
    for verb, name in (("train", "run"), ("baseline", "baseline")):
        assert dbtrain(verb, recipe, "--run", folder / name, "--backend", "inline").code == 0
        assert dbtrain("assemble", folder / name).code == 0
        assert dbtrain("evaluate", folder / name).code == 0
    return folder


@pytest.fixture(scope="session")
def texts(family_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Assembled runs `causal_lm` and `masked_lm`, and the first's `baseline`; nobody writes there."""
    folder = tmp_path_factory.mktemp("texts")
    for family in ("causal_lm", "masked_lm"):
        recipe = folder / f"{family}.yaml"
        recipe.write_text(family_config(family, training={"steps": 1}).to_yaml())
        assert dbtrain("train", recipe, "--run", folder / family, "--backend", "inline").code == 0
        assert dbtrain("assemble", folder / family).code == 0
    recipe = folder / "causal_lm.yaml"
    assert dbtrain("baseline", recipe, "--run", folder / "baseline", "--backend", "inline").code == 0
    assert dbtrain("assemble", folder / "baseline").code == 0
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run_copy(trained_runs: Path, place: Path) -> Path:
    """A finished, assembled run to damage."""
    shutil.copytree(trained_runs / "run", place / "run")
    return place / "run"


@pytest.fixture
def shards_copy(digits: Path, place: Path) -> Path:
    """Prepared digits to damage."""
    shutil.copytree(digits, place / "shards")
    return place / "shards"
