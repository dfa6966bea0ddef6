"""Writing shards: batches of rows in, uncompressed Arrow IPC files of one record batch each out.

Memory is bounded by one shard. Each file is hashed while it is written and fsynced before it counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

from dbtrain.data.columns import Column, Rows
from dbtrain.data.manifest import ColdCopy, ShardFile, Split, SplitFiles
from dbtrain.data.shards import shard_schema

COLD_FOLDER = "cold"

_ALIGNMENT = 64
_COPY_BYTES = 1 << 20


class Sink(Protocol):
    """What Arrow needs of a file to write to."""

    closed: bool

    def write(self, data: memoryview, /) -> int:
        """Append bytes."""
        ...

    def tell(self) -> int:
        """Bytes so far."""
        ...

    def flush(self) -> None:
        """Hand everything to the operating system."""
        ...

    def close(self) -> None:
        """Close."""
        ...


class HashingFile:
    """A file open for writing that knows the size and SHA-256 of what went through it."""

    def __init__(self, path: Path):
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        self._hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self.bytes

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Make the bytes durable and close."""
        if not self.closed:
            self.closed = True
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        """Digest of the bytes so far, as hexadecimal digits."""
        return self._hash.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file, durably."""
    file = HashingFile(path)
    try:
        file.write(data)
    finally:
        file.close()


class SplitWriter:
    """Collects the rows of one split and writes a shard whenever one is full."""

    def __init__(self, folder: Path, split: Split, columns: Sequence[Column], shard_bytes: int, cold: bool):
        rows = max(1, shard_bytes // sum(column.bytes for column in columns))
        # A multiple of 64 rows leaves every column of full shards aligned as well.
        self._capacity = rows // _ALIGNMENT * _ALIGNMENT or rows
        self._folder = folder
        self._split = split
        self._columns = columns
        self._cold = cold
        self._buffers = self._empty(0)
        self._room = 0
        self._used = 0
        self._shards: list[ShardFile] = []

    def append(self, rows: Rows) -> None:
        """Add rows: an array (N, *shape) for each column."""
        count, taken = len(rows[self._columns[0].name]), 0
        while taken < count:
            self._reserve(self._used + count - taken)
            part = min(count - taken, self._capacity - self._used)
            for name, buffer in self._buffers.items():
                buffer[self._used : self._used + part] = rows[name][taken : taken + part]
            self._used += part
            taken += part
            if self._used == self._capacity:
                self._flush()

    def finish(self) -> SplitFiles | None:
        """Write what is left. None when there was not a single row."""
        if self._used:
            self._flush()
        if not self._shards:
            return None
        return SplitFiles(rows=sum(shard.rows for shard in self._shards), shards=tuple(self._shards))

    def _reserve(self, rows: int) -> None:
        """Room for `rows`, at most a shard's; doubling, so that a small set never allocates a whole shard."""
        if rows <= self._room or self._room == self._capacity:
            return
        self._room = min(self._capacity, max(rows, 2 * self._room))
        larger = self._empty(self._room)
        for name, buffer in self._buffers.items():
            larger[name][: self._used] = buffer[: self._used]
        self._buffers = larger

    def _empty(self, rows: int) -> Rows:
        return {column.name: np.empty((rows, *column.shape), dtype=column.numpy) for column in self._columns}

    def _flush(self) -> None:
        name = f"{self._split}-{len(self._shards):05d}.arrow"
        file = HashingFile(self._folder / name)
        try:
            rows = {name: buffer[: self._used] for name, buffer in self._buffers.items()}
            write_shard(file, self._columns, rows)
        finally:
            file.close()
        cold = freeze(self._folder, name) if self._cold else None
        self._shards.append(ShardFile(file=name, rows=self._used, bytes=file.bytes, sha256=file.sha256, cold=cold))
        self._used = 0


def write_shard(sink: Sink, columns: Sequence[Column], rows: Rows) -> None:
    """Write one shard as a single record batch: an array (N, *shape) for each column, C-contiguous.

    The first column starts at a multiple of 64 bytes in the file: rows of whole cache lines stay whole.
    """
    batch = _record_batch(columns, rows, -_body_offset(columns) % _ALIGNMENT)
    with pa.ipc.new_file(cast(pa.NativeFile, sink), batch.schema) as writer:
        writer.write_batch(batch)


def _record_batch(columns: Sequence[Column], rows: Rows, padding: int) -> pa.RecordBatch:
    # Arrow aligns buffers relative to the body; a filler in the schema's metadata moves the body itself.
    about = {"columns": "; ".join(map(str, columns)), "padding": " " * padding}
    arrays = [_arrow(column, rows[column.name]) for column in columns]
    return pa.record_batch(arrays, schema=shard_schema(columns).with_metadata(about))


def _arrow(column: Column, values: npt.NDArray[Any]) -> pa.Array[Any]:
    if not column.shape:
        numbers: pa.Array[Any] = pa.array(values)
        return numbers
    buffer = pa.py_buffer(values.reshape(len(values), -1).view(np.uint8).data)
    stored: pa.Array[Any] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(column.bytes), len(values), [None, buffer])
    return stored


def _body_offset(columns: Sequence[Column]) -> int:
    """Where the first column would start in a file without padding."""
    row = {column.name: np.zeros((1, *column.shape), dtype=column.numpy) for column in columns}
    sink = pa.BufferOutputStream()
    batch = _record_batch(columns, row, padding=0)
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    whole = sink.getvalue()
    column = pa.ipc.open_file(pa.BufferReader(whole)).get_batch(0).column(0).buffers()[1]
    assert column is not None
    return column.address - whole.address


def freeze(folder: Path, name: str) -> ColdCopy:
    """Write the zstd twin of a shard and return what the manifest says of it."""
    (folder / COLD_FOLDER).mkdir(exist_ok=True)
    relative = f"{COLD_FOLDER}/{name}.zst"
    file = HashingFile(folder / relative)
    try:
        with (folder / name).open("rb") as hot:
            compressor = zstandard.ZstdCompressor(level=3)
            for chunk in compressor.read_to_iter(hot, read_size=_COPY_BYTES, write_size=_COPY_BYTES):
                file.write(chunk)
    finally:
        file.close()
    return ColdCopy(file=relative, bytes=file.bytes, sha256=file.sha256)
