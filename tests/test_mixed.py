"""Networks of `benchmarks/mixed.py`: each block is the one of the run that it was taken from."""

from __future__ import annotations

import sys
from pathlib import Path

import mixed
import pytest
import yaml
from quality import figures_of, train_one
from small_families import raw_config

from dbtrain.config_file import load_config
from dbtrain.errors import UserError
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.runs import model_at


@pytest.mark.slow
def test_each_block_says_what_it_said_in_its_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    sections = {"training": {"steps": 12}, "schedule": {"warmup_steps": 2}, "logging": {"every": 4}}
    recipe.write_text(yaml.safe_dump(raw_config("vit", digits, **sections)))
    paths = {}
    for name, rate, seed in (("slow", 0.003, 7), ("quick", 0.03, 7), ("stranger", 0.003, 8)):
        paths[name] = str(tmp_path / name)
        train_one(load_config(recipe, [f"optimiser.lr={rate}", f"seed={seed}"]), "blocks", tmp_path / name)
    paths["wide"] = str(tmp_path / "wide")
    train_one(load_config(recipe, ["noise.sigma_max=60"]), "blocks", tmp_path / "wide")
    said = {name: figures_of(evaluate(model_at(path))) for name, path in paths.items()}

    both = figures_of(evaluate(mixed.mixed([paths["slow"], paths["quick"], paths["slow"]])))
    assert said["slow"]["alone: block 1"] != said["quick"]["alone: block 1"]
    for block, name in enumerate(("slow", "quick", "slow")):
        assert both[f"alone: block {block}"] == said[name][f"alone: block {block}"]
    assert figures_of(evaluate(mixed.mixed([paths["slow"]] * 3))) == said["slow"]

    relaying = str(tmp_path / "relaying")
    train_one(load_config(recipe, ["blocks.relay_every=4"]), "blocks", Path(relaying))
    for path, problem in ((paths["stranger"], "codebook"), (paths["wide"], "noise ranges"), (relaying, "go on from")):
        with pytest.raises(UserError, match=problem):
            mixed.mixed([paths["slow"], paths["slow"], path])
    monkeypatch.setattr(sys, "argv", ["mixed.py", f"{paths['slow']}+{paths['quick']}"])
    with pytest.raises(SystemExit) as left:
        mixed.main()
    assert left.value.code == 2
    assert "2 runs make a network of 2" in capsys.readouterr().err
