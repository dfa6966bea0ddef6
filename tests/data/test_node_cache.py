"""One verified copy of the shards on a machine, whoever comes first and whatever happens to them."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from object_store import ObjectStore

from dbtrain.data.manifest import MANIFEST_FILE, Manifest
from dbtrain.data.node_cache import local_shards, read_manifest
from dbtrain.data.prepare import prepare
from dbtrain.data.shards import STAMP_FILE, ShardSet
from dbtrain.data_config import DataConfig
from dbtrain.errors import CorruptData, UserError

FILL = (
    "import sys, logging; logging.basicConfig(level=logging.INFO)\n"
    "from dbtrain.data.node_cache import local_shards\n"
    "from dbtrain.data_config import DataConfig\n"
    "print('ready', flush=True); sys.stdin.readline()\n"
    "print(local_shards(DataConfig(path=sys.argv[1], cache=sys.argv[2]), sys.argv[3]))"
)


def start_filler(data: DataConfig, sha256: str) -> subprocess.Popen[str]:
    """A process of its own that is about to ask for the shards; a line on its standard input lets it go."""
    assert data.path is not None
    assert data.cache is not None
    command = [sys.executable, "-c", FILL, data.path, data.cache, sha256]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != STAMP_FILE}


def strangers(cache: Path, sha256: str) -> list[str]:
    """What is in the cache beside the copy and its lock."""
    return [path.name for path in cache.iterdir() if path.name not in (sha256, f".{sha256}.lock")]


@pytest.fixture
def sha256(shards: Path) -> str:
    return Manifest.load(shards).facts().sha256


@pytest.fixture
def data(shards: Path, object_store: ObjectStore, tmp_path: Path) -> DataConfig:
    """Seven small shards in an object store, and a cache that is not there yet."""
    shutil.copytree(shards, object_store.folder / "shards")
    return DataConfig(source="animals", path=object_store.uri("shards"), cache=str(tmp_path / "node" / "cache"))


def test_a_folder_is_read_where_it_is(shards: Path, tmp_path: Path, sha256: str) -> None:
    assert local_shards(DataConfig(path=str(shards)), sha256) == shards
    assert local_shards(DataConfig(path=shards.as_uri()), sha256) == shards
    copy = local_shards(DataConfig(path=str(shards), cache=str(tmp_path / "cache")), sha256)
    assert copy == tmp_path / "cache" / sha256
    assert contents(copy) == contents(shards)


def test_a_uri_has_a_cache_of_its_own_accord(
    data: DataConfig, tmp_path: Path, sha256: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = local_shards(data.model_copy(update={"cache": None}), sha256)
    assert folder == tmp_path / "home" / "dbtrain" / "shards" / sha256
    ShardSet.open(folder, "train").verify()


def test_the_source_is_not_asked_again(
    data: DataConfig, object_store: ObjectStore, shards: Path, sha256: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local_shards(data, sha256)
    assert contents(folder) == contents(shards)
    before = object_store.requests
    # Nor are the bytes: their digests were taken while they were copied.
    monkeypatch.setattr("dbtrain.data.shards.file_sha256", None)
    assert local_shards(data, sha256) == folder
    assert object_store.requests == before


def test_many_processes_copy_once(data: DataConfig, object_store: ObjectStore, shards: Path, sha256: str) -> None:
    """Their reads all wait for one gate, so that none can have come too late to copy."""
    processes = [start_filler(data, sha256) for _ in range(4)]
    object_store.gate.clear()
    for process in processes:
        go(process)
    wait_until(lambda: len(list(data.cache_folder.glob(".*.lock"))) == 1)
    object_store.gate.set()
    told = [process.communicate(timeout=100) for process in processes]
    assert {out for out, _ in told} == {f"{data.cache_folder / sha256}\n"}, told
    assert sum("copying" in err for _, err in told) == 1, told
    for name, content in contents(shards).items():
        assert object_store.sent[f"shards/{name}"] == len(content), name
    assert contents(data.cache_folder / sha256) == contents(shards)
    assert strangers(data.cache_folder, sha256) == []


def test_a_killed_copier_is_followed_by_the_next(data: DataConfig, object_store: ObjectStore, sha256: str) -> None:
    """One dies with some shards copied while another waits for it; the other then copies, and clears up."""
    first, second = (start_filler(data, sha256) for _ in range(2))
    cache = data.cache_folder
    object_store.gate.clear()
    object_store.passes = 2
    go(first)
    wait_until(lambda: len(list(cache.glob(".*.partial-*/*.arrow"))) == 2)
    go(second)
    first.kill()
    first.wait()
    assert not (cache / sha256).exists()
    object_store.gate.set()
    out, err = second.communicate(timeout=100)
    assert out == f"{cache / sha256}\n", err
    ShardSet.open(cache / sha256, "train").verify()
    assert strangers(cache, sha256) == []


def flip(folder: Path) -> None:
    path = folder / "train-00001.arrow"
    content = bytearray(path.read_bytes())
    content[-300] ^= 4
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "test-00000.arrow"
    path.write_bytes(path.read_bytes()[:-1])


def lose(folder: Path) -> None:
    (folder / "train-00000.arrow").unlink()


def garble(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text("{")


def swap(folder: Path) -> None:
    """Another data set under the name of this one."""
    shutil.rmtree(folder)
    prepare("digits", folder)


@pytest.mark.parametrize("damage", [flip, cut, lose, garble, swap])
def test_a_damaged_copy_is_copied_anew(
    data: DataConfig, shards: Path, sha256: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = local_shards(data, sha256)
    damage(folder)
    assert local_shards(data, sha256) == folder
    assert contents(folder) == contents(shards)
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "is copied anew" in told
    assert str(folder) in told


def test_a_damaged_copy_stays_mapped_where_it_is_in_use(data: DataConfig, sha256: str) -> None:
    opened = ShardSet.open(local_shards(data, sha256), "train")
    before = opened.gather("image", np.arange(opened.rows))
    lose(opened.folder)
    local_shards(data, sha256)
    assert (opened.gather("image", np.arange(opened.rows)) == before).all()


def test_an_outage_in_mid_copy_is_survived(
    data: DataConfig, object_store: ObjectStore, shards: Path, sha256: str, caplog: pytest.LogCaptureFixture
) -> None:
    object_store.refusals = 140  # more than the client takes, for each of the shards copied at once
    folder = local_shards(data, sha256)
    assert contents(folder) == contents(shards)
    assert "trying again" in caplog.text


@pytest.mark.slow
def test_an_outage_that_lasts(
    data: DataConfig, object_store: ObjectStore, sha256: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbtrain.retry.TRIES", 1)  # the client's own patience is enough here
    object_store.refusals = 10_000
    with pytest.raises(UserError, match="cannot be read") as caught:
        local_shards(data, sha256)
    assert caught.value.field == "data.path"
    assert "network" in str(caught.value)
    assert strangers(data.cache_folder, sha256) == []
    object_store.refusals = 0
    local_shards(data, sha256)


@pytest.mark.parametrize("damage", [flip, cut])
def test_damage_of_the_source_is_not_copied(
    data: DataConfig, object_store: ObjectStore, sha256: str, damage: Callable[[Path], None]
) -> None:
    damage(object_store.folder / "shards")
    with pytest.raises(CorruptData, match=r"s3://bucket/shards/t.*\.arrow"):
        local_shards(data, sha256)
    assert strangers(data.cache_folder, sha256) == []
    assert not (data.cache_folder / sha256).exists()


def test_a_shard_that_the_source_lacks(data: DataConfig, object_store: ObjectStore, sha256: str) -> None:
    lose(object_store.folder / "shards")
    with pytest.raises(UserError, match=r"train-00000\.arrow.*is missing"):
        local_shards(data, sha256)


def test_a_cold_copy_will_do(parquet_source: Path, tmp_path: Path) -> None:
    source = tmp_path / "source-shards"
    facts = prepare(str(parquet_source), source, cold=True).facts()
    whole = contents_of_files(source)
    for shard in source.glob("train-*.arrow"):
        shard.unlink()
    folder = local_shards(DataConfig(path=str(source), cache=str(tmp_path / "cache")), facts.sha256)
    assert contents_of_files(folder) == whole
    assert not (folder / "cold").exists()


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name != STAMP_FILE}


def test_text_brings_its_tokenizer(topics: Path, tmp_path: Path) -> None:
    sha256 = Manifest.load(topics).facts().sha256
    data = DataConfig(path=str(topics), cache=str(tmp_path / "cache"))
    folder = local_shards(data, sha256)
    assert contents(folder) == contents(topics)
    (folder / "tokenizer.json").unlink()
    assert contents(local_shards(data, sha256)) == contents(topics)


def test_other_data_is_refused_before_it_is_copied(data: DataConfig, object_store: ObjectStore) -> None:
    with pytest.raises(UserError, match="holds other shards than are needed"):
        local_shards(data, "a" * 64)
    assert [key for key in object_store.sent if key.endswith(".arrow")] == []


def test_where_the_filesystem_has_no_locks(
    data: DataConfig, shards: Path, sha256: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may then copy at once: the second one finds the work done, and its own is dropped."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    faster = data.model_copy(update={"cache": f"{data.cache}-of-another"})
    finished = local_shards(faster, sha256)

    def copied(folder: Path, manifest: Manifest) -> None:
        shutil.copytree(finished, data.cache_folder / sha256)

    monkeypatch.setattr("dbtrain.data.node_cache.verify_copied", copied)
    assert contents(local_shards(data, sha256)) == contents(shards)
    assert strangers(data.cache_folder, sha256) == []


def test_the_manifest_of_a_uri(data: DataConfig, shards: Path, object_store: ObjectStore) -> None:
    assert read_manifest(data) == Manifest.load(shards)
    garble(object_store.folder / "shards")
    with pytest.raises(CorruptData, match=r"s3://bucket/shards/manifest\.json"):
        read_manifest(data)
    (object_store.folder / "shards" / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match="holds no prepared data") as caught:
        read_manifest(data)
    assert caught.value.field == "data.path"
    object_store.forbidden = True
    with pytest.raises(UserError, match="ACCESS_DENIED"):
        read_manifest(data)
