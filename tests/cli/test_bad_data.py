"""Data that is missing or damaged: one message, exit code 2, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import assert_refused, dbtrain, overrides, unchanged
from PIL import Image


def write_images(root: Path, classes: int = 2, count: int = 12) -> Path:
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng([label, index]).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return root


def write_parquet(path: Path, root: Path, labels: list[int]) -> None:
    """Image Parquet in the layout of the Hugging Face datasets, with two named classes."""
    files = sorted(root.rglob("*.png"))[: len(labels)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": file.read_bytes(), "path": None} for file in files], type=kind)
    names = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}
    table = pa.table({"img": images, "label": pa.array(labels, pa.int64())})
    metadata = {"huggingface": json.dumps({"info": {"features": names}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def corrupt_png(place: Path) -> list[str]:
    (write_images(place / "photos") / "class1" / "05.png").write_bytes(b"\x89PNG\r\n\x1a\nnot at all")
    return ["05.png", "corrupt image", "mend or remove it"]


def truncated_png(place: Path) -> list[str]:
    file = write_images(place / "photos") / "class0" / "03.png"
    file.write_bytes(file.read_bytes()[:60])
    return ["03.png", "corrupt image"]


def empty_folder(place: Path) -> list[str]:
    (place / "photos").mkdir()
    return ["SOURCE", "photos", "no class folders", "root/<class>/*.png"]


def empty_class(place: Path) -> list[str]:
    (write_images(place / "photos") / "class9").mkdir()
    return ["class9", "holds no images", "fill or remove it"]


def one_split(place: Path) -> list[str]:
    write_images(place / "photos" / "train")
    return ["photos", "train folder without the other split"]


def not_square(place: Path) -> list[str]:
    Image.new("L", (8, 6)).save(write_images(place / "photos") / "class0" / "00.png")
    return ["00.png", "not square", "--size"]


def corrupt_parquet(place: Path) -> list[str]:
    write_images(place / "pngs")
    write_parquet(place / "photos", place / "pngs", [0, 1] * 12)
    data = bytearray((place / "photos").read_bytes())
    data[len(data) // 3 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 3)
    (place / "photos").write_bytes(data)
    return ["photos"]


def truncated_parquet(place: Path) -> list[str]:
    write_images(place / "pngs")
    write_parquet(place / "photos", place / "pngs", [0, 1] * 12)
    data = (place / "photos").read_bytes()
    (place / "photos").write_bytes(data[: len(data) // 2])
    return ["photos"]


def class_id_out_of_range(place: Path) -> list[str]:
    write_images(place / "pngs")
    write_parquet(place / "photos", place / "pngs", [0, 1] * 11 + [2, 0])
    return ["photos", "class id 2", "outside 0..1"]


def text_file(place: Path) -> list[str]:
    (place / "photos").write_text("hello")
    return ["photos"]


SOURCES = [
    corrupt_png,
    truncated_png,
    empty_folder,
    empty_class,
    one_split,
    not_square,
    corrupt_parquet,
    truncated_parquet,
    class_id_out_of_range,
    text_file,
]


@pytest.mark.parametrize("damage", SOURCES, ids=lambda damage: damage.__name__)
def test_a_source_that_cannot_be_prepared(place: Path, damage: Callable[[Path], list[str]]) -> None:
    expected = damage(place)
    with unchanged(place):
        result = dbtrain("prepare", "photos", "--out", "shards")
    assert_refused(result, *expected)


def test_a_failed_overwrite_leaves_the_old_shards(place: Path) -> None:
    write_images(place / "photos")
    assert dbtrain("prepare", "photos", "--out", "shards").code == 0
    (place / "photos" / "class1" / "05.png").write_bytes(b"")
    with unchanged(place):
        assert_refused(dbtrain("prepare", "photos", "--out", "shards"), "--out", "pass --overwrite")
        assert_refused(dbtrain("prepare", "photos", "--out", "shards", "--overwrite"), "05.png")


def test_a_folder_of_other_things_is_not_replaced(place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "letter.txt").write_text("dear")
    with unchanged(place):
        result = dbtrain("prepare", "digits", "--out", "mine", "--overwrite")
    assert_refused(result, "--out", "mine", "holds no prepared data", "choose another folder")


def shard_of(shards: Path) -> Path:
    return shards / json.loads((shards / "manifest.json").read_text())["splits"]["train"]["shards"][0]["file"]


def missing_shard(shards: Path) -> list[str]:
    shard_of(shards).unlink()
    return ["shard", shard_of(shards).name, "missing", "dbtrain prepare"]


def truncated_shard(shards: Path) -> list[str]:
    shard = shard_of(shards)
    shard.write_bytes(shard.read_bytes()[:-100])
    return ["shard", shard.name, "bytes", "dbtrain prepare"]


def altered_shard(shards: Path) -> list[str]:
    shard = shard_of(shards)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return ["shard", shard.name, "dbtrain prepare"]


def class_id_in_a_shard(shards: Path) -> list[str]:
    """A shard that fits its manifest to the byte and still holds a label that no class has."""
    shard, path = shard_of(shards), shards / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["splits"]["train"]["shards"][0]
    with pa.ipc.open_file(shard) as reader:
        batch = reader.get_batch(0)
        labels = batch.column(1).to_numpy().copy()
        schema = reader.schema
    labels[7] = 10
    with pa.ipc.new_file(shard, schema) as writer:
        writer.write_batch(pa.record_batch([batch.column(0), pa.array(labels)], schema=schema))
    data = shard.read_bytes()
    entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(manifest))
    return ["shard", shard.name, "class id 10", "outside 0..9"]


def broken_manifest(shards: Path) -> list[str]:
    (shards / "manifest.json").write_text("{")
    return ["manifest", "is not a manifest", "--overwrite"]


def rows_do_not_add_up(shards: Path) -> list[str]:
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["rows"] += 1
    path.write_text(json.dumps(manifest))
    return ["manifest", "do not add up"]


def no_manifest(shards: Path) -> list[str]:
    shutil.rmtree(shards)
    shards.write_text("a file where the folder should be")
    return ["shards"]


def data_of_another_source(shards: Path) -> list[str]:
    path = shards / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": "/photos"}))
    return ["data.source = 'digits'", "prepared from '/photos'", "a name of your own"]


SHARDS = [
    missing_shard,
    truncated_shard,
    altered_shard,
    class_id_in_a_shard,
    broken_manifest,
    rows_do_not_add_up,
    no_manifest,
    data_of_another_source,
]


@pytest.mark.parametrize("damage", SHARDS, ids=lambda damage: damage.__name__)
def test_shards_that_are_damaged(
    recipe: Path, place: Path, shards_copy: Path, damage: Callable[[Path], list[str]]
) -> None:
    expected = damage(shards_copy)
    with unchanged(place):
        line = ("train", recipe, "--run", "run", "--backend", "inline", *overrides(f"data.path={shards_copy}"))
        result = dbtrain(*line)
    assert_refused(result, *expected)
