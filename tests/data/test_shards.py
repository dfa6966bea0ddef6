from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import random_pixels

from dbtrain.data.columns import Column, DType, ImageShape, Rows, token_column
from dbtrain.data.manifest import Manifest, SplitFiles
from dbtrain.data.prepare import prepare
from dbtrain.data.shard_writer import HashingFile, SplitWriter, write_shard
from dbtrain.data.shards import STAMP_FILE, ShardSet, file_sha256
from dbtrain.errors import CorruptData, UserError


def first_shard(folder: Path) -> Path:
    return folder / "train-00000.arrow"


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


def test_gather_crosses_shards_in_any_order(shards: Path) -> None:
    data = ShardSet.open(shards, "train")
    expected = random_pixels(40).transpose(0, 3, 1, 2)
    rows = np.array([39, 0, 8, 9, 10, 0, 27])
    images, labels = data.gather("image", rows), data.gather("label", rows)
    assert len(data.manifest.splits["train"].shards) == 5
    assert data.rows == 40
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.array_equal(images, expected[rows])
    assert np.array_equal(labels, rows % 4)
    assert images.flags.writeable


def test_gather_from_a_single_shard(shards: Path) -> None:
    data = ShardSet.open(shards, "test")
    rows = np.array([9, 1, 1])
    assert np.array_equal(data.gather("image", rows), random_pixels(10, seed=1).transpose(0, 3, 1, 2)[rows])


@pytest.mark.parametrize("row", [-1, 40])
def test_rows_outside_are_refused(shards: Path, row: int) -> None:
    with pytest.raises(IndexError):
        ShardSet.open(shards, "train").gather("label", np.array([0, row]))


def write_manifest(folder: Path, columns: tuple[Column, ...], files: SplitFiles) -> None:
    """A manifest of images in which the test split is the training split."""
    channels = columns[0].shape[0]
    manifest = Manifest(
        source="test",
        kind="image" if columns[0].dtype == "uint8" else "latent",
        columns=columns,
        class_names=("a",),
        splits={"train": files, "test": files},
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    (folder / "manifest.json").write_text(manifest.to_json())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from(["uint8", "float16", "float32"]),
    channels=st.sampled_from([1, 3]),
    size=st.integers(1, 9),
    batches=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    shard_bytes=st.integers(1, 20_000),
)
def test_what_goes_in_comes_out(
    tmp_path: Path, dtype: DType, channels: int, size: int, batches: list[int], shard_bytes: int
) -> None:
    columns = ImageShape(channels=channels, height=size, width=size).columns(dtype)
    writer = SplitWriter(tmp_path, "train", columns, shard_bytes, cold=False)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (sum(batches), channels, size, size)).astype(dtype)
    labels = generator.integers(-(2**62), 2**62, sum(batches))
    start = 0
    for count in batches:
        writer.append({"image": pixels[start : start + count], "label": labels[start : start + count]})
        start += count
    files = writer.finish()
    if files is None:
        assert sum(batches) == 0
        return
    assert files.rows == sum(batches)
    write_manifest(tmp_path, columns, files)
    data = ShardSet.open(tmp_path, "train")
    assert data.gather("image", np.arange(data.rows)).dtype == np.dtype(dtype)
    assert np.array_equal(data.gather("image", np.arange(data.rows)), pixels)
    assert np.array_equal(data.gather("label", np.arange(data.rows)), labels)


@pytest.mark.parametrize(
    "columns",
    [
        *(
            ImageShape(channels=channels, height=size, width=size).columns()
            for channels in (1, 3)
            for size in (1, 7, 32)
        ),
        ImageShape(channels=4, height=5, width=5).columns("float16"),
        ImageShape(channels=4, height=3, width=3).columns("float32"),
        (token_column(33, 256),),
        (token_column(33, 257),),
        (token_column(33, 70_000),),
    ],
    ids=lambda columns: str(columns[0]),
)
def test_shards_are_ordinary_aligned_arrow_files(tmp_path: Path, columns: tuple[Column, ...]) -> None:
    path = tmp_path / "x.arrow"
    file = HashingFile(path)
    rows: Rows = {
        column.name: np.arange(64 * column.size).reshape(64, *column.shape).astype(column.numpy) for column in columns
    }
    write_shard(file, columns, rows)
    file.close()
    assert file.bytes == path.stat().st_size
    whole = pa.py_buffer(path.read_bytes())
    reader = pa.ipc.open_file(pa.BufferReader(whole))
    assert reader.num_record_batches == 1
    batch = reader.get_batch(0)
    assert batch.column(0)[63].as_py() == rows[columns[0].name][63].tobytes()
    for column in batch.columns:
        buffer = column.buffers()[1]
        assert buffer is not None
        assert (buffer.address - whole.address) % 64 == 0


def test_missing_data_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dbtrain prepare") as caught:
        ShardSet.open(tmp_path / "nowhere", "train")
    assert caught.value.field == "data.path"


def test_missing_shard(shards: Path) -> None:
    first_shard(shards).unlink()
    with pytest.raises(UserError, match="the shard is missing"):
        ShardSet.open(shards, "train")


def test_truncated_shard(shards: Path) -> None:
    os.truncate(first_shard(shards), 500)
    with pytest.raises(CorruptData, match="is truncated: 500 bytes") as caught:
        ShardSet.open(shards, "train")
    assert "train-00000.arrow" in str(caught.value)


def test_garbage_of_the_right_size(shards: Path) -> None:
    path = first_shard(shards)
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CorruptData, match="not a readable Arrow file"):
        ShardSet.open(shards, "train")


def edit_manifest(folder: Path, **changes: object) -> None:
    """Change the first training shard's entry, keeping the sums right."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["train"]["shards"][0].update(changes)
    raw["splits"]["train"]["rows"] = sum(shard["rows"] for shard in raw["splits"]["train"]["shards"])
    path.write_text(json.dumps(raw))


def test_rows_that_do_not_match_the_manifest(shards: Path) -> None:
    edit_manifest(shards, rows=7)
    with pytest.raises(CorruptData, match="has 9 rows, the manifest says 7"):
        ShardSet.open(shards, "train")


def test_shape_that_does_not_match_the_manifest(shards: Path) -> None:
    path = shards / "manifest.json"
    raw = json.loads(path.read_text())
    raw["columns"][0]["shape"] = [3, 5, 6]
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptData, match=r"not \(image uint8 3x5x6, label int64"):
        ShardSet.open(shards, "train")


def test_altered_bytes_of_the_same_size(shards: Path) -> None:
    path = first_shard(shards)
    flip_byte(path, path.stat().st_size // 2)
    data = ShardSet.open(shards, "train")
    with pytest.raises(CorruptData, match="bytes have changed"):
        data.verify()


def test_class_id_outside_the_names(shards: Path) -> None:
    path = shards / "manifest.json"
    raw = json.loads(path.read_text())
    raw["class_names"] = raw["class_names"][:3]
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptData, match=r"class id 3, outside 0\.\.2"):
        ShardSet.open(shards, "train").verify()


def test_data_of_the_older_format_has_to_be_prepared_again(shards: Path) -> None:
    path = shards / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"version": 1}))
    with pytest.raises(UserError, match="older version") as caught:
        ShardSet.open(shards, "train")
    assert not isinstance(caught.value, CorruptData)
    assert f"`dbtrain prepare {raw['source']} --out {shards} --overwrite`" in str(caught.value)
    prepare(raw["source"], shards, overwrite=True)
    ShardSet.open(shards, "train").verify()


@pytest.mark.parametrize("text", ["", "[", "{}", '{"version": 2}', '{"version": 3}'])
def test_broken_manifest(shards: Path, text: str) -> None:
    (shards / "manifest.json").write_text(text)
    with pytest.raises(CorruptData, match="is not a manifest"):
        ShardSet.open(shards, "train")


def test_manifest_whose_rows_do_not_add_up(shards: Path) -> None:
    path = shards / "manifest.json"
    raw = json.loads(path.read_text())
    raw["splits"]["train"]["rows"] += 1
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptData, match="do not add up"):
        Manifest.load(shards)


def test_verification_is_remembered_until_a_file_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ShardSet.open(shards, "train").verify()
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr("dbtrain.data.shards.file_sha256", counted)
    ShardSet.open(shards, "test").verify()
    assert read == []
    path = first_shard(shards)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    ShardSet.open(shards, "train").verify()
    assert read == [path]


def test_a_broken_stamp_only_costs_time(shards: Path) -> None:
    (shards / STAMP_FILE).write_text("[1")
    ShardSet.open(shards, "train").verify()
    assert json.loads((shards / STAMP_FILE).read_text()).keys() == {
        *(f"train-{index:05d}.arrow" for index in range(5)),
        *(f"test-{index:05d}.arrow" for index in range(2)),
    }


def test_digest_depends_on_content_alone(shards: Path) -> None:
    manifest = Manifest.load(shards)
    facts = manifest.facts()
    moved = manifest.model_copy(update={"source": "elsewhere"}).facts()
    renamed = manifest.model_copy(update={"class_names": ("a", "b", "c", "d")}).facts()
    assert moved.sha256 == facts.sha256
    assert renamed.sha256 != facts.sha256
    assert (facts.train_rows, facts.test_rows) == (40, 10)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """63 MB of images in 8 MiB shards; image number n has the value n % 251 everywhere."""
    columns = ImageShape(channels=3, height=32, width=32).columns()
    writer = SplitWriter(tmp_path, "train", columns, 8 << 20, cold=False)
    for first in range(0, 20480, 2048):
        values = (np.arange(first, first + 2048) % 251).astype(np.uint8)
        pixels = np.broadcast_to(values[:, None, None, None], (2048, 3, 32, 32))
        writer.append({"image": pixels, "label": np.zeros(2048, dtype=np.int64)})
    files = writer.finish()
    assert files is not None
    write_manifest(tmp_path, columns, files)
    return tmp_path


@needs_proc
def test_the_first_batch_leaves_most_of_the_files_on_disk(large: Path) -> None:
    for path in large.glob("*.arrow"):
        # As on a fresh machine: pages that the writer left in the cache would be mapped a megabyte at a time.
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident_bytes()
    data = ShardSet.open(large, "train")
    data.gather("image", np.arange(0, data.rows, data.rows // 32))
    assert resident_bytes() - before < 8 << 20


@needs_proc
def test_memory_stays_flat_over_an_epoch_of_a_large_set(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbtrain.data.shards._RESIDENT_BYTES", 1 << 20)
    data = ShardSet.open(large, "train")
    before = resident_bytes()
    for rows in np.random.default_rng(0).permutation(data.rows).reshape(-1, 128):
        images = data.gather("image", rows)
        assert np.array_equal(images[:, 0, 5, 7], rows % 251)
        assert np.array_equal(images[:, 2, 31, 31], rows % 251)
    assert resident_bytes() - before < 8 << 20
