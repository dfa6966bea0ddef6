"""Walks of `benchmarks/walks.py`: the table has what the ordinary evaluation of that walk says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import walks
import yaml
from quality import train_one
from small_families import raw_config

from dbtrain.config_file import load_config
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.runs import model_at


def table(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    """Lines below the head."""
    monkeypatch.setattr(sys, "argv", ["walks.py", str(folder), *more])
    walks.main()
    return capsys.readouterr().out.splitlines()[2:]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "dit"])
def test_the_recipes_walk_is_a_row(
    family: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    steps = {"training": {"steps": 12}, "schedule": {"warmup_steps": 2}, "optimiser": {"lr": 0.01}}
    recipe.write_text(yaml.safe_dump(raw_config(family, digits, chain={"steps": 3}, **steps)))
    folder = tmp_path / "run"
    train_one(load_config(recipe), "blocks", folder)
    evaluation = evaluate(model_at(str(folder)))
    show = evaluation.metric.show
    capsys.readouterr()
    rows = table(folder, monkeypatch, capsys, "--steps", "3", "5")
    if family == "dit":
        heun, euler = (show(evaluation.readouts[name]) for name in ("heun_3", "euler_5"))
        assert rows[:2] == [f"| heun | 3 | 5 | {heun} |", f"| euler | 5 | 5 | {euler} |"]
        assert [row.split(" | ")[:3] for row in rows[2:]] == [["| heun", "5", "9"], ["| euler", "9", "9"]]
        assert rows[0].split(" | ")[3] != rows[2].split(" | ")[3]
    else:
        said = " | ".join(show(evaluation.readouts[name]) for name in ("first", "last", "product"))
        bridge = model_at(str(folder)).config.chain.bridge
        assert any(row.startswith(f"| {bridge} | 3 | 8 | {said} |") for row in rows)
        assert len(rows) == 6
        of_three, of_five = (row.split(" | ") for row in rows[:2])
        assert of_three[0] == of_five[0]
        assert of_three[3:] != of_five[3:]
        one, eight = table(folder, monkeypatch, capsys, "--steps", "3", "--bridges", bridge, "--noises", "1", "8")
        single = one.strip("| ").split(" | ")
        assert single[:3] == [bridge, "3", "1"]
        assert single[3:6] == single[6:9]  # the mean of one walk is that walk
        assert eight in rows
