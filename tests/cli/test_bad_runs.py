"""Run directories, checkpoints, models and images that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import assert_refused, dbtrain, overrides, unchanged
from PIL import Image

RefusedPlace = Callable[[Path], list[str]]


def train(recipe: Path, run: str, *settings: str) -> tuple[object, ...]:
    return ("train", recipe, "--run", run, "--backend", "inline", *overrides(*settings))


def test_a_run_directory_of_another_configuration(recipe: Path, place: Path, run_copy: Path) -> None:
    with unchanged(place):
        result = dbtrain(*train(recipe, "run", "optimiser.lr=0.5", "blocks.count=2"))
    assert_refused(result, "--run", str(run_copy), "optimiser.lr: 0.001 -> 0.5", "blocks.count: 3 -> 2", "choose")


def test_a_baseline_does_not_go_into_a_run_of_blocks(recipe: Path, place: Path, run_copy: Path) -> None:
    with unchanged(place):
        result = dbtrain("baseline", recipe, "--run", run_copy, "--backend", "inline")
    assert_refused(result, "--run", "plan.kind: 'blocks' -> 'end_to_end'")


def test_placement_and_cadence_are_no_other_configuration(recipe: Path, run_copy: Path) -> None:
    assert dbtrain(*train(recipe, "run", "checkpoints.every=5", "resources.workers=1", "name=other")).code == 0


def a_file(place: Path) -> list[str]:
    (place / "run").write_text("not a folder")
    return ["is a file", "choose a new directory"]


def somebodys_files(place: Path) -> list[str]:
    (place / "run").mkdir()
    for name in ("a.txt", "b.txt"):
        (place / "run" / name).write_text("mine")
    return ["holds no run, but other files: a.txt, b.txt", "choose a new or empty directory"]


def a_damaged_plan(place: Path) -> list[str]:
    (place / "run").mkdir()
    (place / "run" / "plan.json").write_text("{")
    (place / "run" / "config.yaml").write_text("name: x\n")
    return ["plan.json cannot be read"]


@pytest.mark.parametrize("prepare", [a_file, somebodys_files, a_damaged_plan], ids=lambda prepare: prepare.__name__)
def test_a_place_that_cannot_be_a_run_directory(recipe: Path, place: Path, prepare: RefusedPlace) -> None:
    expected = prepare(place)
    with unchanged(place):
        result = dbtrain(*train(recipe, "run"))
    assert_refused(result, str(place / "run"), *expected)


def test_what_a_start_that_died_leaves_is_taken_over(recipe: Path, place: Path) -> None:
    (place / "run" / ".tmp-plan.json-0123456789ab").mkdir(parents=True)
    (place / "run" / "config.yaml").write_text("torn: [")
    assert dbtrain(*train(recipe, "run")).code == 0


@pytest.mark.parametrize("verb", ["assemble", "evaluate", "figures", "report"])
@pytest.mark.parametrize("what", ["nothing", "a folder", "a file"])
def test_what_is_not_a_run(place: Path, verb: str, what: str) -> None:
    if what == "a folder":
        (place / "run").mkdir()
    elif what == "a file":
        (place / "run").write_text("hello")
    with unchanged(place):
        result = dbtrain(verb, "run")
    assert_refused(result, f"RUN = '{place / 'run'}'", "is not a run directory", "dbtrain train CONFIG --run DIR")


def newest_checkpoint(run: Path, block: int) -> Path:
    return sorted((run / "blocks" / f"{block:02d}" / "checkpoints").iterdir())[-1]


@pytest.mark.parametrize("verb", ["assemble", "evaluate", "figures", "compare", "predict", "sample"])
def test_an_unfinished_run(trained_runs: Path, place: Path, run_copy: Path, verb: str) -> None:
    shutil.rmtree(run_copy / "model")
    shutil.rmtree(newest_checkpoint(run_copy, 1))
    rest = {"compare": [trained_runs / "baseline"], "predict": ["a.png"]}
    with unchanged(place):
        result = dbtrain(verb, "run", *rest.get(verb, []))
    assert_refused(result, "block 1 has reached step 10 of 20", str(run_copy), "finish it with `dbtrain train`")


def test_a_run_of_which_a_block_has_not_begun(place: Path, run_copy: Path) -> None:
    shutil.rmtree(run_copy / "blocks" / "02" / "checkpoints")
    with unchanged(place):
        result = dbtrain("assemble", "run")
    assert_refused(result, "block 2 has no checkpoint yet", "train it first")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["ema.safetensors*", "MANIFEST", "state.json"])
def test_a_tampered_checkpoint_is_not_assembled(place: Path, run_copy: Path, name: str) -> None:
    (file,) = newest_checkpoint(run_copy, 1).glob(name)
    flip(file)
    with unchanged(place):
        result = dbtrain("assemble", "run")
    assert_refused(result, file.name, "step-00000020")


def test_a_checkpoint_of_another_block_is_not_assembled(place: Path, run_copy: Path) -> None:
    shutil.rmtree(newest_checkpoint(run_copy, 1))
    shutil.copytree(newest_checkpoint(run_copy, 2), run_copy / "blocks" / "01" / "checkpoints" / "step-00000020")
    with unchanged(place):
        result = dbtrain("assemble", "run")
    assert_refused(result, "block 1 comes from another block or run")


@pytest.mark.filterwarnings("ignore:skipping a damaged checkpoint")
def test_a_tampered_checkpoint_is_trained_again_from_the_one_before(
    recipe: Path, trained_runs: Path, run_copy: Path
) -> None:
    (file,) = newest_checkpoint(run_copy, 1).glob("model.safetensors*")
    flip(file)
    result = dbtrain(*train(recipe, "run"), "--json")
    assert result.code == 0
    assert [block["step"] for block in result.json()["blocks"]] == [20] * 3
    digests = {dbtrain("assemble", run, "--json").json()["sha256"] for run in ("run", trained_runs / "run")}
    assert len(digests) == 1


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_a_tampered_model(place: Path, run_copy: Path, verb: str) -> None:
    flip(run_copy / "model" / "model.safetensors")
    Image.new("L", (8, 8)).save(place / "a.png")
    with unchanged(place):
        result = dbtrain(verb, "run", *(["a.png"] if verb == "predict" else []))
    assert_refused(result, str(run_copy), "model.safetensors is not the file")


def test_averaged_weights_of_a_run_that_keeps_none(recipe: Path, place: Path) -> None:
    assert dbtrain(*train(recipe, "run", "ema.half_life=0", "training.steps=2")).code == 0
    with unchanged(place):
        result = dbtrain("assemble", "run", "--weights", "ema")
    assert_refused(result, "--weights = 'ema'", "kept no averaged weights", "use --weights raw")


def test_swapped_arguments(trained_runs: Path) -> None:
    with unchanged(trained_runs):
        result = dbtrain("compare", trained_runs / "baseline", trained_runs / "run")
    assert_refused(result, "BASELINE", str(trained_runs / "run"), "no end-to-end run", "swap the two")


@pytest.mark.parametrize("verb", ["evaluate", "figures"])
def test_a_run_of_blocks_is_no_baseline(trained_runs: Path, verb: str) -> None:
    with unchanged(trained_runs):
        result = dbtrain(verb, trained_runs / "run", "--baseline", trained_runs / "run")
    assert_refused(result, "BASELINE", "no end-to-end run", "`dbtrain baseline`")


def test_data_that_has_moved(trained_runs: Path, place: Path, run_copy: Path, digits: Path) -> None:
    about = json.loads((run_copy / "model" / "config.json").read_text())
    about["config"]["data"]["path"] = str(place / "gone")
    (run_copy / "model" / "config.json").write_text(json.dumps(about))
    with unchanged(place):
        assert_refused(dbtrain("evaluate", "run"), "data.path", str(place / "gone"), "--data")
        assert_refused(dbtrain("evaluate", "run", "--data", "nowhere"), "nowhere", "--data")
    assert dbtrain("evaluate", "run", "--data", digits).code == 0


IMAGES = {
    "missing": ("no.png", "no such image file"),
    "a folder": ("folder", "no such image file"),
    "corrupt": ("corrupt.png", "corrupt image"),
    "truncated": ("truncated.png", "corrupt image"),
    "empty": ("empty.png", "image"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_that_cannot_be_read(trained_runs: Path, place: Path, case: str) -> None:
    (place / "folder").mkdir()
    Image.effect_noise((64, 64), 50).save(place / "good.png")
    (place / "truncated.png").write_bytes((place / "good.png").read_bytes()[:500])
    (place / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    (place / "empty.png").write_bytes(b"")
    name, problem = IMAGES[case]
    with unchanged(place):
        result = dbtrain("predict", trained_runs / "run", "good.png", name)
    assert_refused(result, f"'{name}'", problem)


def test_an_unknown_readout(trained_runs: Path, place: Path) -> None:
    Image.new("L", (8, 8)).save(place / "a.png")
    result = dbtrain("predict", trained_runs / "run", "a.png", "--readout", "frist")
    assert_refused(result, "--readout = 'frist'", "first", "product_mean")


def test_an_unknown_device(trained_runs: Path) -> None:
    assert_refused(dbtrain("evaluate", trained_runs / "run", "--device", "gpu"), "device = 'gpu'", "use cpu")
