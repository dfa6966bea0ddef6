"""Data sets of the Hugging Face hub: from a server, from the cache alone, and from folders in the hub's layout."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer, go_offline
from image_files import png, random_pixels, write_parquet

from dbtrain.data.prepare import prepare
from dbtrain.data.sources.hub import HubSource, parse
from dbtrain.errors import UserError

CONFIGS = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/*.parquet}
- config_name: large
  data_files:
  - {split: train, path: large/*.parquet}
---
"""


def write_images(root: Path, splits: dict[str, int]) -> None:
    """Splits of so many images, in the hub's layout."""
    for seed, (split, count) in enumerate(splits.items()):
        images = [png(pixels) for pixels in random_pixels(count, seed=seed)]
        path = root / "data" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, images, [row % 2 for row in range(count)], ["ant", "bee"])


def write_text(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(texts)}), path)


@pytest.fixture
def bugs(hub: HubServer) -> Path:
    """The data set `me/bugs` on the server: 40 training and 10 test images."""
    root = hub.repository("datasets", "me/bugs")
    write_images(root, {"train": 40, "test": 10})
    return root


def test_the_rows_are_those_of_the_files(bugs: Path, tmp_path: Path) -> None:
    from_hub = prepare("hf:me/bugs", tmp_path / "from-hub")
    from_files = prepare(str(bugs), tmp_path / "from-files")
    assert from_hub.facts() == from_files.facts()
    assert (from_hub.source, from_hub.class_names) == ("hf:me/bugs", ("ant", "bee"))
    from_folder = prepare(f"hf:{bugs}", tmp_path / "from-folder")
    assert (from_folder.facts(), from_folder.source) == (from_files.facts(), f"hf:{bugs}")


def test_offline_from_the_cache(bugs: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare("hf:me/bugs", tmp_path / "first")
    hub.vanish(monkeypatch)
    assert prepare("hf:me/bugs", tmp_path / "second").facts() == first.facts()
    go_offline(monkeypatch)
    assert prepare("hf:me/bugs", tmp_path / "third").facts() == first.facts()
    with pytest.raises(UserError, match="--subset = 'large': is not in the cache, which alone was asked"):
        prepare("hf:me/bugs", tmp_path / "fourth", subset="large")
    with pytest.raises(UserError, match=r"hf:me/others'.* not in the cache, and the library was told to stay offline"):
        prepare("hf:me/others", tmp_path / "fourth")


def test_one_split(bugs: Path, tmp_path: Path) -> None:
    made = prepare("hf:me/bugs:test", tmp_path / "shards")
    assert {split: files.rows for split, files in made.splits.items()} == {"train": 8, "test": 2}
    assert made.source == "hf:me/bugs:test"
    with pytest.raises(UserError, match=r"has no split 'dev' \(its splits: train, test\)"):
        prepare("hf:me/bugs:dev", tmp_path / "other")


def test_a_validation_split_tests_where_there_is_no_other(tmp_path: Path) -> None:
    write_images(tmp_path / "bugs", {"train": 20, "validation": 6})
    made = prepare(f"hf:{tmp_path / 'bugs'}", tmp_path / "shards")
    assert made.splits["test"].rows == 6


def test_subsets(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    write_text(root / "small" / "a.parquet", *["few words"] * 20)
    write_text(root / "large" / "a.parquet", *["more words than that"] * 20)
    (root / "README.md").write_text(CONFIGS)
    made = {
        name: prepare(f"hf:{root}", tmp_path / name, subset=name, length=8).facts().sha256
        for name in ("small", "large")
    }
    assert len(set(made.values())) == 2
    with pytest.raises(UserError, match=r"--subset: is needed: the data set has several .*'small', 'large'"):
        prepare(f"hf:{root}", tmp_path / "none")
    with pytest.raises(UserError, match=r"--subset = 'medium': is no subset of it .*'small', 'large'"):
        prepare(f"hf:{root}", tmp_path / "medium", subset="medium")
    with pytest.raises(UserError, match="--subset = 'small': does not apply to the digits"):
        prepare("digits", tmp_path / "digits", subset="small")


def test_text_beside_labels_and_sounds(tmp_path: Path) -> None:
    """A sound is stored as images are, and is none."""
    root = tmp_path / "texts"
    root.mkdir()
    features = {
        "sound": {"_type": "Audio"},
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
    }
    sound = pa.array(
        [{"bytes": b"RIFF", "path": None}] * 30, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    columns = {"sound": sound, "text": ["twelve bytes"] * 30, "label": pa.array([0, 1] * 15, pa.int64())}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), root / "train.parquet")
    made = prepare(f"hf:{root}", tmp_path / "shards", length=13)
    assert made.text is not None
    assert made.text.splits["train"].documents == 27
    assert made.splits["train"].rows == 27


def test_a_folder_of_image_files(class_folders: Callable[..., Path], tmp_path: Path) -> None:
    """The library keeps the names of the files alone."""
    root = class_folders({"ant": 20, "bee": 20})
    from_hub = prepare(f"hf:{root}", tmp_path / "from-hub")
    assert (from_hub.class_names, from_hub.splits["train"].rows) == (("ant", "bee"), 36)
    assert from_hub.facts() == prepare(str(root), tmp_path / "from-files").facts()


def test_images_that_nothing_calls_images(tmp_path: Path) -> None:
    """Parquet without the library's metadata: structs of bytes and path."""
    images = [png(pixels) for pixels in random_pixels(20)]
    write_parquet(tmp_path / "bare" / "train.parquet", images, [row % 2 for row in range(20)])
    made = prepare(f"hf:{tmp_path / 'bare'}", tmp_path / "from-hub")
    assert made.facts() == prepare(str(tmp_path / "bare"), tmp_path / "from-files").facts()


def write_names(path: Path, names: list[str]) -> None:
    """Images of which the table has the names alone."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": ["ant"], "_type": "ClassLabel"}}
    images = pa.array([{"bytes": None, "path": name} for name in names], kind)
    table = pa.table({"image": images, "label": pa.array([0] * len(names), pa.int64())})
    path.parent.mkdir(parents=True)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def test_image_files_on_the_hub(class_folders: Callable[..., Path], hub: HubServer, tmp_path: Path) -> None:
    root = class_folders({"ant": 10, "bee": 10})
    shutil.copytree(root, hub.repository("datasets", "me/files"))
    assert prepare("hf:me/files", tmp_path / "from-hub").facts() == prepare(str(root), tmp_path / "from-files").facts()
    # What is not of the data set stays unread, though it is there.
    mine = str(root / "ant" / "000.png")
    write_names(hub.repository("datasets", "me/names") / "train.parquet", [mine] * 20)
    with pytest.raises(UserError, match=f"has an image that is a file elsewhere: {mine}"):
        prepare("hf:me/names", tmp_path / "shards")


def no_folder(root: Path) -> tuple[str, str]:
    return "hf:./nowhere", "there is no such folder"


def no_owner(root: Path) -> tuple[str, str]:
    return "hf:mnist", "is no data set of the hub"


def no_split(root: Path) -> tuple[str, str]:
    return "hf:me/bugs:", "names no split after the colon"


def a_folder_of_that_name(root: Path) -> tuple[str, str]:
    (root / "me" / "bugs").mkdir(parents=True)
    return "hf:me/bugs", "could be the data set or the folder me/bugs .*write hf:./me/bugs for the folder"


def an_empty_folder(root: Path) -> tuple[str, str]:
    (root / "empty").mkdir()
    return "hf:./empty", "cannot be loaded: .*data files"


def a_damaged_file(root: Path) -> tuple[str, str]:
    (root / "torn").mkdir()
    (root / "torn" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    return "hf:./torn", "is damaged, or its files do not go together"


def no_training_rows(root: Path) -> tuple[str, str]:
    write_images(root / "bugs", {"validation": 6})
    return "hf:./bugs", "has no split 'train' .*hf:./bugs:SPLIT: validation"


def a_program(root: Path) -> tuple[str, str]:
    (root / "made").mkdir()
    (root / "made" / "made.py").write_text(f"open({str(root / 'ran')!r}, 'w').close()")
    return "hf:./made", "is a program that makes the data"


def a_missing_image(root: Path) -> tuple[str, str]:
    write_names(root / "gone" / "train.parquet", ["/no/such.png"] * 20)
    return "hf:./gone", "has an image that cannot be read: .*such.png"


@pytest.mark.parametrize(
    "make",
    [
        *(no_folder, no_owner, no_split, a_folder_of_that_name, an_empty_folder, a_damaged_file, no_training_rows),
        *(a_program, a_missing_image),
    ],
    ids=lambda make: make.__name__,
)
def test_what_is_refused(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], tuple[str, str]],
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    source, said = make(place)
    with pytest.raises(UserError, match=said) as refused:
        prepare(source, tmp_path / "shards")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "shards").exists()
    assert not (place / "ran").exists()


def test_what_the_hub_refuses(bugs: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(source: str) -> str:
        with pytest.raises(UserError) as refused:
            prepare(source, tmp_path / "shards")
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "'hf:me/nothing': is not on the hub, or not open to you" in said("hf:me/nothing")
    hub.gated.add("me/bugs")
    assert "is gated: its owners choose who may read it (ask for access on its page" in said("hf:me/bugs")
    hub.gated.clear()
    (bugs / "bugs.py").write_text("raise SystemExit")
    assert "no programs of data sets are run" in said("hf:me/bugs")
    hub.vanish(monkeypatch)
    assert f"{hub.url} does not answer, and the cache does not have it (check the network" in said("hf:me/nothing")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"'datasets', which is not installed \(pip install 'dbtrain\[hf\]'\)"):
        prepare("hf:me/bugs", tmp_path / "shards")


def test_folders_with_colons(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert parse(f"hf:{folder}") == HubSource(str(folder), True, None)
    assert parse(f"hf:{folder}:train") == HubSource(str(folder), True, "train")
    assert parse("hf:me/bugs:train") == HubSource("me/bugs", False, "train")
