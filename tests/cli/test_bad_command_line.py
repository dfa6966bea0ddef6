"""Mistakes in the command line and in the configuration: one message, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import assert_refused, dbtrain, finish, overrides, start, unchanged

SETTINGS = {
    "misspelt key": (["training.step=3"], "training.step: is not a known key", "did you mean 'steps'?"),
    "misspelt section": (["trainnig.steps=3"], "trainnig: is not a known key", "did you mean 'training'?"),
    "misspelt key deep down": (["blocks.partition.knd=uniform"], "blocks.partition.knd", "did you mean 'kind'?"),
    "a section given a value": (["training=3"], "training", "3", "has to be a section"),
    "a word for a number": (["training.steps=many"], "training.steps = 'many'", "valid integer"),
    "a fraction for a count": (["training.steps=2.5"], "training.steps = 2.5", "valid integer"),
    "not a number": (["optimiser.lr=.nan"], "optimiser.lr = nan", "finite"),
    "zero steps": (["training.steps=0"], "training.steps = 0", "greater than or equal to 1"),
    "dropout of 1": (["model.dropout=1.0"], "model.dropout = 1.0", "less than 1"),
    "negative seed": (["seed=-1"], "seed = -1", "greater than or equal to 0"),
    "unknown choice": (["training.precision=float64"], "training.precision = 'float64'", "'float32' or 'bfloat16'"),
    "more blocks than layers": (["blocks.count=5"], "blocks.count 5", "4 layers of model.depth"),
    "split of other length": (["blocks.split=[2,2]"], "blocks.split [2, 2]", "3 blocks", "add up to 4"),
    "patch does not divide": (["model.patch_size=3"], "patch_size 3 does not divide image_size 8"),
    "heads do not divide": (["model.heads=3"], "heads 3 does not divide width 16"),
    "noise upside down": (["noise.sigma_min=90"], "sigma_min 90", "below sigma_max 80"),
    "no field": (["training.steps"], "--set = 'training.steps'", "section.field=value", "write training.steps=500"),
    "no name": (["=3"], "--set = '=3'", "section.field=value"),
    "value is no YAML": (["training.steps=[1"], "--set = 'training.steps=[1'", "not YAML"),
    "below a value": (["seed.low=1"], "--set = 'seed.low=1'", "seed is a value, not a section"),
    "other image size": (["model.image_size=16"], "model.image_size = 16", "8 pixels high", "set model.image_size=8"),
    "other channels": (["model.channels=3"], "model.channels = 3", "1 channels", "set model.channels=1"),
    "other classes": (["model.num_classes=7"], "model.num_classes = 7", "class ids 0..9", "set model.num_classes=10"),
    "unknown data": (["data.source=cats", "data.path=null"], "data.source = 'cats'", "dbtrain prepare SOURCE --out"),
    "a GPU inline": (["resources.gpus=9"], "resources.gpus = 9.0", "asks for 9 GPUs", "set resources.gpus="),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting(recipe: Path, place: Path, case: str) -> None:
    settings, *expected = SETTINGS[case]
    assert isinstance(settings, list)
    with unchanged(place):
        result = dbtrain("train", recipe, "--run", "run", "--backend", "inline", *overrides(*settings))
    assert_refused(result, *map(str, expected))


FILES = {
    "empty": (b"", "is empty", "configs/demo/vit.yaml is an example"),
    "a list": (b"- a\n- b\n", "holds a list, not sections"),
    "a word": (b"hello\n", "holds a str, not sections"),
    "no YAML": (b"a: [1\nb: 2\n", "is not YAML", "line 2"),
    "an image": (b"\x89PNG\r\n", "cannot be read"),
    "no model": (b"name: a\ntraining: {steps: 3}\n", "model: is required and was not given", "add model"),
}


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_configuration(place: Path, verb: str, case: str) -> None:
    content, *expected = FILES[case]
    assert isinstance(content, bytes)
    (place / "run.yaml").write_bytes(content)
    with unchanged(place):
        result = dbtrain(verb, "run.yaml")
    assert_refused(result, *map(str, expected))


LINES = {
    "no configuration": (["train"], "CONFIG: is required", "`dbtrain train --help`"),
    "missing configuration": (["train", "no.yaml"], "CONFIG = 'no.yaml'", "no such configuration file"),
    "a folder as configuration": (["plan", "."], "CONFIG = '.'", "Is a directory", "give the YAML file"),
    "misspelt verb": (["trian"], "trian", "Did you mean 'train'?"),
    "misspelt option": (["train", "RECIPE", "--bakcend", "ray"], "--bakcend", "--backend"),
    "unknown backend": (["train", "RECIPE", "--backend", "slurm"], "--backend", "slurm", "ray", "inline"),
    "order is no list": (["train", "RECIPE", "--order", "a,b"], "--order = 'a,b'", "write 2,1,0"),
    "order leaves one out": (["train", "RECIPE", "--order", "2,0"], "--order = '2,0'", "name 0 to 2"),
    "order names one twice": (["train", "RECIPE", "--order", "0,1,1"], "--order = '0,1,1'", "every block once"),
    "address without Ray": (
        ["train", "RECIPE", "--backend", "inline", "--address", "auto"],
        "--address = 'auto'",
        "--backend ray",
        "leave out one",
    ),
    "no blocks": (["plan", "RECIPE", "--blocks", "0"], "--blocks = 0", "at least 1"),
    "a word for blocks": (["plan", "RECIPE", "--blocks", "few"], "--blocks = 'few'", "whole number"),
    "too many blocks": (["plan", "RECIPE", "--blocks", "9"], "blocks.count 9", "4 layers"),
    "memory without unit": (["plan", "RECIPE", "--memory", "3 apples"], "--memory = '3 apples'", "write 8GB"),
    "negative memory": (["plan", "RECIPE", "--memory=-1GB"], "--memory = '-1GB'", "above 0"),
    "unknown split": (["evaluate", "x", "--split", "val"], "--split", "val", "test", "train"),
    "no images": (["predict", "x"], "IMAGE", "is required"),
    "nothing to prepare": (["prepare", "nowhere"], "SOURCE = 'nowhere'", "no such file or folder", "give `digits`"),
    "size 0": (["prepare", "digits", "--size", "0"], "--size = 0", "at least 1"),
    "two channels": (["prepare", "digits", "--channels", "2"], "--channels = 2", "1 or 3"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_wrong_command_line(recipe: Path, place: Path, case: str) -> None:
    words, *expected = LINES[case]
    assert isinstance(words, list)
    with unchanged(place):
        result = dbtrain(*[recipe if word == "RECIPE" else word for word in words])
    assert_refused(result, *map(str, expected))


def test_a_mistake_in_the_real_command_is_one_line_and_exit_code_2(recipe: Path, place: Path) -> None:
    with unchanged(place):
        result = finish(start("train", recipe, "--run", "run", "--set", "trainnig.steps=3"))
    assert_refused(result, "trainnig: is not a known key (did you mean 'training'?)")


def test_a_mistake_of_ours_is_not_hidden(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dbtrain.cli.planning.load_config", broken)
    with pytest.raises(ZeroDivisionError):
        dbtrain("plan", "any.yaml")
