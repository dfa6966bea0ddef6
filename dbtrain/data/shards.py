"""Reading shards: memory-mapped Arrow IPC files, opened without being read.

Each file holds one uncompressed record batch, so that a column is one contiguous buffer and a sample a slice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dbtrain.data.columns import Column
from dbtrain.data.manifest import TOKENIZER_FILE, Manifest, ShardFile, Split
from dbtrain.errors import CorruptData, UserError

STAMP_FILE = ".verified.json"

# Pages of a mapped file stay resident after they were read. Sets smaller than this may stay mapped whole.
_RESIDENT_BYTES = 256 << 20

VerifyProgress = Callable[[int, int], None]
"""Called with bytes read so far and bytes to read."""


def shard_schema(columns: Sequence[Column]) -> pa.Schema:
    """What a shard of these columns looks like to Arrow."""
    fields: list[pa.Field[Any]] = [pa.field(column.name, column.arrow, nullable=False) for column in columns]
    return pa.schema(fields)


@dataclass(frozen=True)
class _Mapped:
    """Views into one mapped file: of each column, (rows, numbers a row), or (rows,) for single numbers."""

    file: mmap.mmap
    rows: int
    columns: dict[str, npt.NDArray[Any]]


class ShardSet:
    """The rows of one split."""

    def __init__(self, folder: Path, split: Split, manifest: Manifest, shards: list[_Mapped]):
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self._shards = shards
        self._shapes = {column.name: column.shape for column in manifest.columns}
        self._starts = np.cumsum([0] + [shard.rows for shard in shards])
        self.rows = int(self._starts[-1])
        self._release = sum(len(shard.file) for shard in shards) > _RESIDENT_BYTES

    @classmethod
    def open(cls, folder: Path, split: Split) -> ShardSet:
        """Map all shards of a split; checks manifest, sizes, rows and schema, and reads no samples.

        Raises:
            UserError: the folder holds no prepared data, or a shard is missing.
            CorruptData: a shard is truncated or is not what the manifest says.
        """
        manifest = Manifest.load(folder)
        shards = [_map(folder, shard, manifest.columns) for shard in manifest.splits[split].shards]
        return cls(folder, split, manifest, shards)

    def gather(self, column: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Copy rows (N,) of a column out of the mapped files, once: (N, *shape) of the column's own type.

        Raises:
            IndexError: a row is outside of the split.
            KeyError: there is no such column.
        """
        if rows.size and rows.view(np.uint64).max() >= self.rows:  # so read, negative numbers are the largest
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a split of {self.rows}")
        columns: list[npt.NDArray[Any]] = [shard.columns[column] for shard in self._shards]
        out = np.empty((len(rows), *columns[0].shape[1:]), dtype=columns[0].dtype)
        touched = [0]
        if len(columns) == 1:
            # clip: numpy would otherwise gather into a second buffer first; the bounds are checked above.
            np.take(columns[0], rows, axis=0, out=out, mode="clip")
        else:
            owners = np.searchsorted(self._starts, rows, side="right") - 1
            touched = np.unique(owners).tolist()
            local = rows - self._starts[owners]
            for target, (owner, row) in enumerate(zip(owners.tolist(), local.tolist(), strict=True)):
                out[target] = columns[owner][row]
        if self._release and hasattr(mmap, "MADV_DONTNEED"):
            # The pages leave this process, not the system's cache: its memory stays flat over an epoch.
            for owner in touched:
                self._shards[owner].file.madvise(mmap.MADV_DONTNEED)
        return out.reshape(len(rows), *self._shapes[column])

    def verify(self, progress: VerifyProgress | None = None) -> None:
        """Compare every shard of both splits with its digest, labels with the class names, tokens with the vocabulary.

        Files that passed before and have the same size, modification time and inode are not read again.

        Raises:
            CorruptData: a file's bytes are not those its manifest promises.
        """
        verify_folder(self.folder, self.manifest, progress)


def verify_folder(folder: Path, manifest: Manifest, progress: VerifyProgress | None = None) -> None:
    """What `ShardSet.verify` does, without mapping what is verified already."""
    stamps = _read_stamps(folder)
    shards = manifest.shards
    total, done = sum(shard.bytes for shard in shards), 0
    fresh: dict[str, list[int | str]] = {}
    for shard in shards:
        stamp = _stamp(folder / shard.file, shard)
        if stamps.get(shard.file) != stamp:
            _verify_file(folder, shard, manifest)
        fresh[shard.file] = stamp
        done += shard.bytes
        if progress is not None:
            progress(done, total)
    if manifest.text is not None:
        _verify_tokenizer(folder / TOKENIZER_FILE, manifest.text.tokenizer_sha256)
    if fresh != stamps:
        _write_stamps(folder, fresh)


def verify_copied(folder: Path, manifest: Manifest) -> None:
    """What is left to verify of shards whose digests were taken while they were copied; `verify` then skips them.

    Raises:
        CorruptData: values in a shard are not what the manifest promises.
    """
    for shard in manifest.shards:
        _verify_values(folder, shard, manifest)
    _write_stamps(folder, {shard.file: _stamp(folder / shard.file, shard) for shard in manifest.shards})


def _map(folder: Path, shard: ShardFile, columns: Sequence[Column]) -> _Mapped:
    path = folder / shard.file
    _check_size(path, shard)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are taken in random order: reading ahead would only fill memory.
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
        batch = reader.get_batch(0) if reader.num_record_batches == 1 else None
    except (OSError, pa.ArrowException) as error:
        raise _corrupt(path, f"is not a readable Arrow file: {_one_line(error)}") from None
    if batch is None:
        raise _corrupt(path, f"has {reader.num_record_batches} record batches, not one")
    if not batch.schema.equals(shard_schema(columns), check_metadata=False):
        found = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)
        raise _corrupt(path, f"has the columns ({found}), not ({', '.join(map(str, columns))})")
    if batch.num_rows != shard.rows:
        raise _corrupt(path, f"has {batch.num_rows} rows, the manifest says {shard.rows}")
    views = {column.name: _view(batch.column(index), column, shard.rows) for index, column in enumerate(columns)}
    return _Mapped(mapped, shard.rows, views)


def _view(stored: pa.Array[Any], column: Column, rows: int) -> npt.NDArray[Any]:
    buffer = stored.buffers()[1]
    assert buffer is not None
    numbers = np.frombuffer(memoryview(buffer), column.numpy, rows * column.size)
    return numbers.reshape(rows, column.size) if column.shape else numbers


def _check_size(path: Path, shard: ShardFile) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError("the shard is missing", field="shard", value=path, mend=_MEND) from None
    if size < shard.bytes:
        raise _corrupt(path, f"is truncated: {size} bytes, the manifest says {shard.bytes}")
    if size > shard.bytes:
        raise _corrupt(path, f"has {size} bytes, the manifest says {shard.bytes}")


def _verify_file(folder: Path, shard: ShardFile, manifest: Manifest) -> None:
    path = folder / shard.file
    _check_size(path, shard)
    if file_sha256(path) != shard.sha256:
        raise _corrupt(path, "its bytes have changed since it was prepared (SHA-256 differs)")
    _verify_values(folder, shard, manifest)


def _verify_values(folder: Path, shard: ShardFile, manifest: Manifest) -> None:
    path = folder / shard.file
    views = _map(folder, shard, manifest.columns).columns
    if manifest.text is not None:
        highest = int(views["tokens"].max())
        if highest >= manifest.text.vocab_size:
            raise _corrupt(path, f"has the token {highest}, outside 0..{manifest.text.vocab_size - 1}")
        return
    labels, last = views["label"], max(len(manifest.class_names), 1) - 1
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > last:
        raise _corrupt(path, f"has the class id {low if low < 0 else high}, outside 0..{last}")


def _verify_tokenizer(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise UserError("the tokenizer is missing", field="tokenizer", value=path, mend=f"{_MEND} --overwrite")
    if file_sha256(path) != sha256:
        raise CorruptData(
            "its bytes have changed since the text was prepared (SHA-256 differs)",
            field="tokenizer",
            value=path,
            mend=f"{_MEND} --overwrite",
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_MEND = "prepare the data again with `dbtrain prepare`"


def _corrupt(path: Path, problem: str) -> CorruptData:
    mend = f"{_MEND} --overwrite; with cold copies, delete the file and it is restored"
    return CorruptData(problem, field="shard", value=path, mend=mend)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _stamp(path: Path, shard: ShardFile) -> list[int | str]:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError("the shard is missing", field="shard", value=path, mend=_MEND) from None
    return [shard.sha256, status.st_size, status.st_mtime_ns, status.st_ino]


def _read_stamps(folder: Path) -> dict[str, Any]:
    try:
        stamps = json.loads((folder / STAMP_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _write_stamps(folder: Path, stamps: dict[str, list[int | str]]) -> None:
    temporary = folder / f"{STAMP_FILE}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(stamps))
        temporary.replace(folder / STAMP_FILE)
    except OSError:
        # The data may lie on a read-only or full disk. The stamp only saves time.
        with contextlib.suppress(OSError):
            temporary.unlink()
