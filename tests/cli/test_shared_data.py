"""Runs whose shards lie elsewhere: the same results, and one message for what keeps them from being read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import Result, assert_refused, dbtrain, overrides, tree, unchanged
from object_store import ObjectStore
from small_disks import fill, resize, small_disk

from dbtrain.data.manifest import Manifest


@pytest.fixture
def uri(digits: Path, object_store: ObjectStore) -> str:
    """The prepared digits in an object store."""
    shutil.copytree(digits, object_store.folder / "digits", ignore=shutil.ignore_patterns(".*"))
    return object_store.uri("digits")


def train(recipe: Path, run: object, *changes: str) -> Result:
    return dbtrain("train", recipe, "--run", run, "--backend", "inline", *overrides(*changes))


def model_of(run: Path) -> bytes:
    assert dbtrain("assemble", run).code == 0
    return (run / "model" / "model.safetensors").read_bytes()


def test_the_same_model_comes_out(
    recipe: Path, place: Path, trained_runs: Path, uri: str, object_store: ObjectStore, digits: Path
) -> None:
    """From an object store, through a cache or straight from a folder; evaluation finds the copy as well."""
    plain = (trained_runs / "run" / "model" / "model.safetensors").read_bytes()
    assert train(recipe, "remote", f"data.path={uri}", "data.cache=cache").code == 0
    assert model_of(place / "remote") == plain
    assert train(recipe, "local", "data.cache=other").code == 0
    assert model_of(place / "local") == plain
    asked = object_store.requests
    first, second = (dbtrain("evaluate", run, "--json") for run in (place / "remote", trained_runs / "run"))
    assert first.json()["readouts"] == second.json()["readouts"]
    assert object_store.requests == asked
    shutil.rmtree(place / "cache")
    assert dbtrain("evaluate", "remote", "--data", digits).code == 0
    assert not (place / "cache").exists()
    assert dbtrain("evaluate", "remote").code == 0
    assert (place / "cache").exists()


def test_a_cache_that_is_a_file(recipe: Path, place: Path, uri: str) -> None:
    (place / "cache").write_text("in the way")
    with unchanged(place):
        for cache in ("cache", "cache/below"):
            result = train(recipe, "run", f"data.path={uri}", f"data.cache={cache}")
            assert_refused(result, "data.cache", str(place / cache), "a file is in the way", "choose another place")


def test_a_cache_that_cannot_be_written(recipe: Path, place: Path, uri: str) -> None:
    with small_disk(place / "disk", "4M", read_only=True) as disk:
        result = train(recipe, "run", f"data.path={uri}", f"data.cache={disk}/cache")
        assert_refused(result, "data.cache", str(disk / "cache"), "read-only")
        assert not (place / "run").exists()


def test_a_cache_without_room(recipe: Path, place: Path, uri: str) -> None:
    with small_disk(place / "disk", "64k") as disk:
        before = tree(disk)
        result = train(recipe, "run", f"data.path={uri}", f"data.cache={disk}")
        assert_refused(result, "data.cache", str(disk), "the shards need", "make room")
        assert {name for name in tree(disk).keys() - before.keys() if not name.endswith(".lock")} == set()
        resize(disk, "4M")
        assert train(recipe, "run", f"data.path={uri}", f"data.cache={disk}").code == 0


def test_a_cache_that_becomes_full_in_mid_copy(recipe: Path, place: Path, uri: str, digits: Path) -> None:
    """There is room for the bytes of the shards, and none for the rest of their last pages and the manifest."""
    pages = sum(shard.bytes for shard in Manifest.load(digits).shards) // 4096 + 1
    with small_disk(place / "disk", f"{pages * 4}k") as disk:
        result = train(recipe, "run", f"data.path={uri}", f"data.cache={disk}")
        assert_refused(result, "data.cache", str(disk), "the disk is full", "make room")
        assert [name for name in tree(disk) if not name.endswith(".lock")] == []
        resize(disk, "4M")
        assert train(recipe, "run", f"data.path={uri}", f"data.cache={disk}").code == 0


def test_a_filled_cache_needs_no_room(recipe: Path, place: Path, uri: str) -> None:
    with small_disk(place / "disk", "4M") as disk:
        line = (f"data.path={uri}", f"data.cache={disk}")
        assert train(recipe, "run", *line).code == 0
        fill(disk)
        assert train(recipe, "again", *line).code == 0


def test_shards_are_not_prepared_at_a_uri(place: Path) -> None:
    """A folder named `s3:` would be no help to anybody."""
    with unchanged(place):
        result = dbtrain("prepare", "digits", "--out", "s3://bucket/digits")
    assert_refused(result, "--out", "s3:", "is a URI", "copy the folder")


def test_what_is_wrong_with_the_source(recipe: Path, place: Path, uri: str, object_store: ObjectStore) -> None:
    def refused(path: str, *parts: str) -> None:
        with unchanged(place):
            assert_refused(train(recipe, "run", f"data.path={path}", "data.cache=cache"), *parts)

    refused("nosuch://bucket/digits", "nosuch://bucket/digits", "a URI that pyarrow knows")
    refused(object_store.uri("nothing"), "data.path", "s3://bucket/nothing", "holds no prepared data", "copy")
    object_store.forbidden = True
    refused(uri, "data.path", "s3://bucket/digits/manifest.json", "ACCESS_DENIED", "credentials")
    object_store.forbidden = False
    # What does not fit is refused before anything is copied.
    result = train(recipe, "run", f"data.path={uri}", "data.cache=cache", "model.num_classes=9")
    assert_refused(result, "model.num_classes", "s3://bucket/digits")
    assert not (place / "cache").exists()
