"""`dbtrain sample` of an image generator: what it writes, and what it refuses before it has drawn anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, dbtrain, unchanged
from PIL import Image
from small_runs import start_run, train_all

from dbtrain.config import RunConfig

FamilyConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def trained(family_config: FamilyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three small diffusion models; nobody writes there. `plain` knows no labels, `told` no images
    without one."""
    folder = tmp_path_factory.mktemp("drawing")
    kinds = {"run": {}, "plain": {"num_classes": None}, "told": {"label_dropout": 0.0}}
    for name, model in kinds.items():
        config = family_config("dit", model=model, training={"steps": 2})
        train_all(start_run(config, folder / name))
        assert dbtrain("assemble", folder / name).code == 0
    return folder


def test_files_and_what_they_hold(trained: Path, place: Path) -> None:
    asked = ("sample", trained / "run", "--label", "7", "--label", "3", "--count", 5, "--guidance", 2, "--out", "out")
    assert dbtrain(*asked, "--json").json() == {"files": ["out/samples.npz", "out/samples.png"], "count": 5}
    with np.load("out/samples.npz", allow_pickle=False) as saved:
        assert saved["arr_0"].shape == (5, 8, 8, 1)
        assert saved["arr_1"].tolist() == [7, 3, 7, 3, 7]
    assert dbtrain("sample", trained / "run", "--count", 2, "--steps", 1, "--out", "out").stdout.split() == [
        "out/samples.npz",
        "out/samples.png",
    ]
    assert sorted(path.name for path in Path("out").iterdir()) == ["samples.npz", "samples.png"]


def test_a_model_given_by_its_uri_has_its_folder_too(trained: Path, place: Path) -> None:
    shutil.copytree(trained / "told" / "model", "model")
    result = dbtrain("sample", f"file://{place}/model", "--count", 1)
    assert result.stdout.splitlines()[0] == str(place / "model" / "samples" / "samples.npz")


REFUSED = {
    "no images": ("run", ["--count", "0"], ["--count = 0", "at least 1"]),
    "fewer than none": ("run", ["--count", "-5", "--label", "3"], ["--count = -5", "at least 1"]),
    "more than fit": ("run", ["--count", "10" + "0" * 12], ["--count = 10", "memory", "draw fewer"]),
    "more than fit, of a class": ("run", ["--count", "1" + "0" * 13, "--label", "3"], ["--count = 1", "memory"]),
    "more than there are numbers": ("run", ["--count", "9" * 26], ["--count = 9", "memory"]),
    "no steps": ("run", ["--steps", "0"], ["--steps = 0", "at least 1"]),
    "a class that is not": ("run", ["--label", "cat"], ["--label = 'cat'", "is not a class", "0, 1, 2"]),
    "a class, of none": ("plain", ["--label", "3"], ["--label", "trained without labels"]),
    "a class that is not, of none": ("plain", ["--label", "cat"], ["--label", "trained without labels"]),
    "guidance without classes": ("plain", ["--guidance", "2"], ["--guidance = 2.0", "with and without a label"]),
    "guidance without dropout": ("told", ["--guidance", "2"], ["--guidance = 2.0", "model.label_dropout"]),
    "a prompt": ("run", ["--prompt", "The"], ["--prompt", "of no use to a dit"]),
    "another solver": ("run", ["--solver", "dpm"], ["--solver = 'dpm'", "euler or heun"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn(trained: Path, place: Path, case: str) -> None:
    run, arguments, expected = REFUSED[case]
    with unchanged(place):
        result = dbtrain("sample", trained / run, "--out", "out", *arguments)
    assert_refused(result, *expected)


@pytest.mark.parametrize("out", ["file", "file/below/it"])
def test_a_folder_that_cannot_be_is_told_before_anything_is_drawn(trained: Path, place: Path, out: str) -> None:
    (place / "file").write_text("mine")
    with unchanged(place):
        # So many images would take a day.
        result = dbtrain("sample", trained / "run", "--count", 10_000_000, "--out", out)
    assert_refused(result, f"--out = '{out}'", "cannot be written to", "Not a directory")


def test_a_finished_run_is_assembled_when_it_is_asked(
    trained_runs: Path, trained: Path, run_copy: Path, place: Path
) -> None:
    Image.effect_noise((8, 8), 50).save("a.png")
    shutil.rmtree(run_copy / "model")
    assert dbtrain("predict", "run", "a.png").stdout == dbtrain("predict", trained_runs / "run", "a.png").stdout
    weights = Path("model", "model.safetensors")
    assert (run_copy / weights).read_bytes() == (trained_runs / "run" / weights).read_bytes()
    shutil.copytree(trained / "run", "dit")
    shutil.rmtree("dit/model")
    assert dbtrain("sample", "dit", "--count", 1).code == 0
    assert Path("dit", weights).read_bytes() == (trained / "run" / weights).read_bytes()
