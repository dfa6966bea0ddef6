"""`dbtrain export`: what it says, where it writes, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import assert_refused, dbtrain, tree, unchanged
from hub_server import TOKEN, HubServer
from small_disks import small_disk

from dbtrain.config import RunConfig

FILES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture
def model(texts: Path, place: Path) -> Path:
    """The run `causal_lm`, the test's own, in the working directory."""
    return Path(shutil.copytree(texts / "causal_lm", place / "run"))


def test_as_json(model: Path, place: Path) -> None:
    result = dbtrain("export", "run", "--out", "new/out", "--json")
    assert (result.code, result.stderr) == (0, "")
    made = result.json()
    known = {"path", "format", "weights", "clean_path", "parameters", "bytes", "sha256", "tokenizer"}
    assert made.keys() == known
    assert (made["format"], made["weights"]) == ("llama", "ema")
    assert (made["path"], made["clean_path"], made["tokenizer"]) == (str(place / "new" / "out"), True, False)
    assert set(tree(place / "new")) == {"out", *(f"out/{name}" for name in FILES)}
    assert made["bytes"] == (place / "new" / "out" / "model.safetensors").stat().st_size
    assert made["parameters"] * 4 < made["bytes"] < made["parameters"] * 4 + 10_000
    # A model folder will do as well, wherever it was copied to.
    shutil.copytree("run/model", "model")
    assert dbtrain("export", "model", "--out", "again", "--json").json() == {**made, "path": str(place / "again")}
    assert tree(place / "again") == tree(place / "new" / "out")


def test_for_people(texts: Path, model: Path, place: Path) -> None:
    result = dbtrain("export", "run", "--out", "out")
    assert result.stdout.startswith(f"{place / 'out'}: ")
    assert "parameters" in result.stdout
    assert "not the denoising chain" in result.stderr
    assert "the folder has no tokenizer" in result.stderr
    shutil.copytree(texts / "baseline", place / "baseline")
    shutil.rmtree("baseline/model")  # a finished run is assembled by the verb
    whole = dbtrain("export", "baseline", "--out", "whole")
    assert whole.code == 0
    assert "denoising" not in whole.stderr


def a_new_folder(place: Path) -> str:
    return "out"


def an_empty_folder(place: Path) -> str:
    (place / "out").mkdir()
    return "out"


def a_link_to_an_empty_folder(place: Path) -> str:
    (place / "elsewhere").mkdir()
    (place / "out").symlink_to("elsewhere")
    return "out"


@pytest.mark.parametrize("where", [a_new_folder, an_empty_folder, a_link_to_an_empty_folder])
def test_where_it_may_go(model: Path, place: Path, where: Callable[[Path], str]) -> None:
    before = set(tree(place))
    result = dbtrain("export", "run", "--out", where(place), "--json")
    assert result.json()["path"] == str(place / "out")
    assert {path.name for path in (place / "out").iterdir()} == FILES
    new = {name.partition("/")[0] for name in set(tree(place)) - before}
    assert new <= {"out", "elsewhere"}


def test_the_working_directory_stays_one(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "out").mkdir()
    monkeypatch.chdir(place / "out")
    assert dbtrain("export", "../run", "--out", ".").code == 0
    assert {path.name for path in Path().iterdir()} == FILES


def test_a_disk_of_its_own(model: Path, tmp_path: Path) -> None:
    """The mount point cannot be renamed, nor anything be put in its place."""
    with small_disk(tmp_path / "disk", "4M") as disk:
        assert dbtrain("export", "run", "--out", disk).code == 0
        assert {path.name for path in disk.iterdir()} == FILES


def somebodys_files(place: Path) -> list[str]:
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("mine")
    return [f"--out = '{place / 'out'}'", "is there already", "choose a new or empty folder"]


def a_hidden_file(place: Path) -> list[str]:
    (place / "out").mkdir()
    (place / "out" / ".mine").write_text("mine")
    return ["--out", "is there already"]


def a_file(place: Path) -> list[str]:
    (place / "out").write_text("mine")
    return [f"--out = '{place / 'out'}'", "Not a directory", "choose a new or empty folder"]


def a_link_to_nothing(place: Path) -> list[str]:
    (place / "out").symlink_to("nowhere")
    return [str(place / "out"), "choose"]


def a_link_to_itself(place: Path) -> list[str]:
    (place / "out").symlink_to("out")
    return [f"--out = '{place / 'out'}'", "Too many levels of symbolic links"]


@pytest.mark.parametrize(
    "taken",
    [somebodys_files, a_hidden_file, a_file, a_link_to_nothing, a_link_to_itself],
    ids=lambda make: make.__name__,
)
def test_a_place_that_is_taken(model: Path, place: Path, taken: Callable[[Path], list[str]]) -> None:
    expected = taken(place)
    with unchanged(place):
        result = dbtrain("export", "run", "--out", "out")
    assert_refused(result, *expected)


PLACES = {
    "below a file": ("run/config.yaml/out", ["--out", "run/config.yaml/out", "Not a directory", "choose"]),
    "the run": ("run", ["--out", "is there already"]),
    "a long name": ("x" * 300, ["--out", "File name too long", "choose"]),
    "almost as long": ("x" * 250, ["x" * 250, "File name too long", "choose a shorter path"]),
    "a bucket": ("s3://bucket/out", ["--out = 's3://bucket/out'", "is an address", "a folder of this machine"]),
    "nobody's home": ("~nobody-of-that-name/out", ["--out = '~nobody-of-that-name/out'", "home"]),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_place_that_is_none(model: Path, place: Path, where: str) -> None:
    out, expected = PLACES[where]
    with unchanged(place):
        result = dbtrain("export", "run", "--out", out)
    assert_refused(result, *expected)


def test_nowhere(model: Path, place: Path) -> None:
    with unchanged(place):
        assert_refused(dbtrain("export", "run"), "--out", "is required and was not given")


@pytest.mark.parametrize("empty", [False, True])
def test_a_disk_that_is_too_small(model: Path, tmp_path: Path, empty: bool) -> None:
    """In a new folder or one that was there: what fitted is gone again."""
    with small_disk(tmp_path / "disk", "32k") as disk, unchanged(disk):
        result = dbtrain("export", "run", "--out", disk if empty else disk / "out")
        assert_refused(result, str(disk), "No space left", "free some space")


def test_a_read_only_disk(model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4M", read_only=True) as disk, unchanged(disk):
        assert_refused(dbtrain("export", "run", "--out", disk / "out"), str(disk), "read-only", "choose another")


def unfinished(texts: Path, place: Path) -> list[str]:
    run = shutil.copytree(texts / "baseline", place / "run")
    shutil.rmtree(run / "blocks" / "00" / "checkpoints")
    shutil.rmtree(run / "model")
    return ["block 0 has no checkpoint yet", "train it first"]


def nothing(texts: Path, place: Path) -> list[str]:
    return ["'run'", "holds no assembled model"]


def a_torn_model(texts: Path, place: Path) -> list[str]:
    path = shutil.copytree(texts / "causal_lm", place / "run") / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return ["model.safetensors is not the file that config.json describes"]


def an_export(texts: Path, place: Path) -> list[str]:
    assert dbtrain("export", texts / "causal_lm", "--out", place / "run").code == 0
    return ["'run'", "config.json is not that of a model"]


@pytest.mark.parametrize("make", [unfinished, nothing, a_torn_model, an_export], ids=lambda make: make.__name__)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_cannot_be_exported(
    texts: Path, place: Path, make: Callable[[Path, Path], list[str]], form: list[str]
) -> None:
    expected = make(texts, place)
    with unchanged(place):
        result = dbtrain("export", "run", "--out", "out", *form)
    assert_refused(result, *expected)


def test_a_format_that_the_family_has_not(texts: Path, place: Path) -> None:
    shutil.copytree(texts / "masked_lm", place / "run")
    with unchanged(place):
        result = dbtrain("export", "run", "--out", "out", "--format", "llama")
    assert_refused(result, "--format = 'llama'", "causal_lm alone, not for masked_lm", "use dbtrain")


def test_another_family(texts: Path, place: Path) -> None:
    shutil.copytree(texts / "masked_lm", place / "run")
    made = dbtrain("export", "run", "--out", "out", "--json").json()
    assert (made["format"], made["clean_path"], made["tokenizer"]) == ("dbtrain", False, True)
    assert dbtrain("sample", "out", "--json").code == 0


def test_to_the_hub_and_back(
    texts: Path, model: Path, place: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ["export", "run", "--format", "dbtrain", "--push", "me/lm"]
    with unchanged(place):
        assert_refused(dbtrain(*ours, "--out", "out"), "--push = 'me/lm'", "needs a token", "set HF_TOKEN")
        assert_refused(dbtrain("export", "run", "--out", "out", "--private"), "--private", "add --push")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sent = dbtrain(*ours, "--out", "out", "--license", "mit", "--private", "--json")
    assert (sent.code, sent.stderr) == (0, "")
    made = sent.json()
    assert made["url"].startswith(f"{hub.url}/me/lm/commit/")
    assert set(hub.files("models", "me/lm")) == {*FILES, "tokenizer.json"}
    card = hub.files("models", "me/lm")["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n")
    assert 'dbtrain.load("hf:me/lm")' in card
    asked = ["--prompt", "The ", "--tokens", "4", "--greedy", "--json"]
    assert dbtrain("sample", "hf:me/lm", *asked).json() == dbtrain("sample", "run", *asked).json()
    # Once more exported, from the hub: the same weights.
    again = dbtrain("export", "hf:me/lm", "--format", "dbtrain", "--out", "again", "--json").json()
    assert again["sha256"] == made["sha256"]
    # What cannot be sent is there nevertheless, complete.
    lost = dbtrain("export", "run", "--out", "llama", "--push", "you/lm")
    assert_refused(lost, "--push = 'you/lm'", "(403)", f"`hf upload you/lm {place / 'llama'}`")
    assert {path.name for path in (place / "llama").iterdir()} == FILES


def test_images_of_a_model_on_the_hub_need_a_folder(
    family_config: Callable[..., RunConfig], place: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "dit.yaml").write_text(family_config("dit", training={"steps": 1}).to_yaml())
    assert dbtrain("train", "dit.yaml", "--run", "run", "--backend", "inline").code == 0
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert dbtrain("export", "run", "--out", "out", "--push", "me/dit").code == 0
    drawing = ["sample", "hf:me/dit", "--count", "1", "--steps", "1"]
    with unchanged(place):
        assert_refused(dbtrain(*drawing), "--out", "is needed where the model is not on this machine's disks")
    assert dbtrain(*drawing, "--out", "images").code == 0
    assert list((place / "images").glob("*.png"))


def test_half_an_export_is_no_model(model: Path, place: Path) -> None:
    """A process that is killed while it fills a folder leaves no config.json there, which is written last."""
    (place / "out").mkdir()
    assert dbtrain("export", "run", "--out", "out").code == 0
    written = {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir()}
    assert written["config.json"] == max(written.values())
