from __future__ import annotations

from pathlib import Path

import pytest

from dbtrain.data import cold as cold_module
from dbtrain.data.cold import restore_cold
from dbtrain.data.manifest import Manifest
from dbtrain.data.prepare import prepare
from dbtrain.data.shard_writer import HashingFile
from dbtrain.data.shards import ShardSet
from dbtrain.errors import CorruptData, UserError


@pytest.fixture
def cold(parquet_source: Path, tmp_path: Path) -> Path:
    prepare(str(parquet_source), tmp_path / "cold-shards", shard_bytes=1000, cold=True)
    return tmp_path / "cold-shards"


def hot_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def test_deleted_shards_come_back_byte_for_byte(cold: Path) -> None:
    before = {path: path.read_bytes() for path in hot_files(cold)}
    for path in before:
        path.unlink()
    assert sorted(restore_cold(cold)) == sorted(path.name for path in before)
    assert {path: path.read_bytes() for path in hot_files(cold)} == before
    ShardSet.open(cold, "train").verify()


def test_shards_that_are_there_are_left_alone(cold: Path) -> None:
    first, *others = hot_files(cold)
    times = [path.stat().st_mtime_ns for path in others]
    first.unlink()
    assert restore_cold(cold) == [first.name]
    assert [path.stat().st_mtime_ns for path in others] == times


def test_a_damaged_cold_copy_restores_nothing(cold: Path) -> None:
    first = hot_files(cold)[0]
    first.unlink()
    copy = cold / "cold" / f"{first.name}.zst"
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    with pytest.raises(CorruptData, match="cold copy is damaged"):
        restore_cold(cold)
    assert not first.exists()
    assert list(cold.glob("*partial*")) + list(cold.glob(".*partial*")) == []


def test_two_runs_restore_the_same_shard_at_once(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hot_files(cold)[0]
    before = first.read_bytes()
    first.unlink()
    files = []

    class Interrupted(HashingFile):
        """The other run begins and ends while this one has just opened its file."""

        def __init__(self, path: Path):
            super().__init__(path)
            files.append(path)
            if len(files) == 1:
                assert restore_cold(cold) == [first.name]

    monkeypatch.setattr(cold_module, "HashingFile", Interrupted)
    assert restore_cold(cold) == [first.name]
    assert len(files) == 2
    assert first.read_bytes() == before


def test_no_cold_copy(shards: Path) -> None:
    hot_files(shards)[0].unlink()
    with pytest.raises(UserError, match="no cold copy"):
        restore_cold(shards)


def test_cold_copies_do_not_change_what_the_data_is(cold: Path, parquet_source: Path, tmp_path: Path) -> None:
    plain = prepare(str(parquet_source), tmp_path / "plain", shard_bytes=1000)
    assert plain.facts() == Manifest.load(cold).facts()
