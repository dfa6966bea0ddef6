"""What scripts rely on: `--json` prints one object, with these names in it, and nothing else on standard output."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path

import pytest
from command import dbtrain, overrides
from PIL import Image

from dbtrain.cli.output import emit_json


def test_plan(recipe: Path, place: Path) -> None:
    result = dbtrain("plan", recipe, "--blocks", 3, "--json")
    plan = result.json()
    assert (result.code, result.stderr) == (0, "")
    assert len(plan["codebook_sha256"]) == 64
    blocks = plan["blocks"]
    assert [block["index"] for block in blocks] == [0, 1, 2]
    edges = [tuple(block["layers"]) for block in blocks]
    assert edges[0][0] == 0
    assert edges[-1][1] == 4
    assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
    assert blocks[0]["noise"]["high"] == 80.0
    assert blocks[-1]["noise"]["low"] == 0.002
    assert all(upper["noise"]["low"] == lower["noise"]["high"] for upper, lower in itertools.pairwise(blocks))
    assert all(block["parameters"] > 0 for block in blocks)
    assert all(
        {"parameters", "gradients", "optimiser", "ema", "activations", "temporary"} <= block["bytes"].keys()
        for block in blocks
    )
    assert all(block["bytes"]["parameters"] == block["parameters"] * 4 for block in blocks)
    assert all(0 <= block["bytes"]["gradients"] <= block["parameters"] * 4 for block in blocks)
    assert not list(place.iterdir())


def test_plan_says_how_many_blocks_fit(recipe: Path) -> None:
    sizes = [
        sum(block["bytes"].values()) for block in dbtrain("plan", recipe, "--blocks", 2, "--json").json()["blocks"]
    ]
    fits = dbtrain("plan", recipe, "--memory", max(sizes), "--json").json()["fits"]
    assert fits == {"memory": max(sizes), "blocks": [2, 3, 4]}


def test_a_calibration_says_how_long_and_leaves_nothing_behind(recipe: Path, place: Path) -> None:
    result = dbtrain("plan", recipe, "--calibrate", "--json")
    plan = result.json()
    assert (result.code, "timing 20 steps of block 0" in result.stderr) == (0, True)
    found = plan["calibration"]
    assert (found["device"], found["threads"], found["steps"]) == ("cpu", 1, 20)
    for timed, block in ((found["block"], plan["blocks"][0]), (found["end_to_end"], plan["end_to_end"])):
        assert (timed["index"], timed["bytes"], timed["steps"]) == (0, sum(block["bytes"].values()), 20)
        assert timed["seconds_per_step"] > 0
        assert timed["hours"] == pytest.approx(20 * timed["seconds_per_step"] / 3600)
    assert not list(place.iterdir())


def test_train_and_train_again(recipe: Path, place: Path) -> None:
    line = ("train", recipe, "--run", "run", "--backend", "inline", "--order", "2,0,1", "--json")
    first = dbtrain(*line)
    assert first.code == 0
    assert first.json()["run"] == str(place / "run")
    names = ("index", "state", "step", "restarts")
    expected = [(index, "finished", 20, 0) for index in range(3)]
    assert [tuple(block[name] for name in names) for block in first.json()["blocks"]] == expected
    starts = [line for line in first.stderr.splitlines() if "starting" in line]
    assert [line.split(":")[0] for line in starts] == ["block 2", "block 0", "block 1"]
    again = dbtrain(*line)
    assert again.json() == first.json()
    assert "starting" not in again.stderr


def test_train_prepares_a_built_in_source_on_first_use(recipe: Path, place: Path) -> None:
    line = ("train", recipe, "--run", "run", "--backend", "inline", *overrides("data.path=null", "training.steps=2"))
    assert dbtrain(*line).code == 0
    assert (place / "data" / "digits" / "manifest.json").is_file()


def test_baseline(recipe: Path, place: Path) -> None:
    result = dbtrain("baseline", recipe, "--backend", "inline", "--set", "training.steps=2", "--json")
    assert result.json()["run"] == str(place / "runs" / "small-baseline")
    assert [(block["index"], block["state"]) for block in result.json()["blocks"]] == [(0, "finished")]


def test_assemble(run_copy: Path) -> None:
    result = dbtrain("assemble", run_copy, "--json")
    assert (result.code, result.stderr) == (0, "")
    made = result.json()
    assert made["sha256"] == hashlib.sha256((run_copy / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert (made["path"], made["weights"], made["blocks"]) == (str(run_copy / "model"), "ema", 3)
    raw = dbtrain("assemble", run_copy, "--weights", "raw", "--json").json()
    assert raw["sha256"] != made["sha256"]


def test_evaluate(trained_runs: Path, run_copy: Path) -> None:
    alone = dbtrain("evaluate", run_copy, "--json")
    assert (alone.code, alone.stderr) == (0, "")
    readouts = alone.json()["readouts"]
    assert set(readouts) == {f"{base}{tail}" for base in ("first", "last", "product") for tail in ("", "_mean")}
    assert all(0.0 <= value <= 1.0 for value in readouts.values())
    assert alone.json()["metric"] == {"name": "accuracy", "unit": "fraction", "better": "higher"}
    assert "baseline" not in alone.json()
    both = dbtrain("evaluate", run_copy, "--baseline", trained_runs / "baseline", "--json").json()
    assert both["readouts"] == readouts
    assert list(both["baseline"]["readouts"]) == ["accuracy"]


def test_predict(trained_runs: Path, place: Path) -> None:
    for name, colour in (("dark.png", 10), ("light one.png", 250)):
        Image.new("RGB", (30, 20), (colour,) * 3).save(place / name)
    answers = dbtrain("predict", trained_runs / "run", "dark.png", "light one.png", "--json").json()["predictions"]
    assert [answer["image"] for answer in answers] == ["dark.png", "light one.png"]
    for answer in answers:
        assert answer["label"] == str(answer["class_id"])
        assert math.isclose(sum(answer["probabilities"]), 1.0, abs_tol=1e-4)
        assert answer["probability"] == max(answer["probabilities"])


def test_compare(trained_runs: Path) -> None:
    sides = dbtrain("compare", trained_runs / "run", trained_runs / "baseline", "--json").json()
    assert sides["run"]["layer_evaluations"] == sides["baseline"]["layer_evaluations"] > 0
    assert sides["run"]["largest_worker_bytes"] < sides["baseline"]["largest_worker_bytes"]
    table = dbtrain("compare", trained_runs / "run", trained_runs / "baseline").stdout
    # Both have the recipe's name: their folders tell them apart.
    assert " ".join(table.split()).startswith(f"{trained_runs / 'run'} beside {trained_runs / 'baseline'}")


def test_figures(run_copy: Path, trained_runs: Path) -> None:
    drawn = dbtrain("figures", run_copy, "--baseline", trained_runs / "baseline", "--json").json()
    assert set(drawn) == {"loss.png", "chain.png"}
    assert all(Image.open(path).size[0] > 100 for path in drawn.values())


def test_prepare(place: Path) -> None:
    made = dbtrain("prepare", "digits", "--json").json()
    assert made["rows"] == {"train": 1438, "test": 359}
    assert made["image"] == {"channels": 1, "height": 8, "width": 8}
    assert Path(made["path"]) == Path("data/digits")


def test_json_knows_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"a": math.nan, "b": [1.5, (-math.inf, {"c": math.inf})]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, [None, {"c": None}]]}
