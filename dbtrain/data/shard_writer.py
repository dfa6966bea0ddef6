"""Writing shards: batches of images in, uncompressed Arrow IPC files of one record batch each out.

Memory is bounded by one shard. Each file is hashed while it is written and fsynced before it counts.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

from dbtrain.data.manifest import ColdCopy, ImageShape, ShardFile, Split, SplitFiles
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


class SplitWriter:
    """Collects the rows of one split and writes a shard whenever one is full."""

    def __init__(self, folder: Path, split: Split, image: ImageShape, shard_bytes: int, cold: bool):
        rows = max(1, shard_bytes // (image.bytes + 8))
        # A multiple of 64 rows leaves the label column of full shards aligned as well.
        self._capacity = rows // _ALIGNMENT * _ALIGNMENT or rows
        self._folder = folder
        self._split = split
        self._image = image
        self._cold = cold
        self._pixels: npt.NDArray[np.uint8] = np.empty((0, image.bytes), dtype=np.uint8)
        self._labels: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._used = 0
        self._shards: list[ShardFile] = []

    def append(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
        """Add images (N, C, H, W) and labels (N,)."""
        flat = images.reshape(len(labels), self._image.bytes)
        while len(labels):
            self._reserve(self._used + len(labels))
            part = min(len(labels), self._capacity - self._used)
            self._pixels[self._used : self._used + part] = flat[:part]
            self._labels[self._used : self._used + part] = labels[:part]
            self._used += part
            flat, labels = flat[part:], labels[part:]
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
        have = len(self._labels)
        if rows <= have or have == self._capacity:
            return
        size = min(self._capacity, max(rows, 2 * have))
        pixels = np.empty((size, self._image.bytes), dtype=np.uint8)
        labels = np.empty(size, dtype=np.int64)
        pixels[: self._used], labels[: self._used] = self._pixels[: self._used], self._labels[: self._used]
        self._pixels, self._labels = pixels, labels

    def _flush(self) -> None:
        name = f"{self._split}-{len(self._shards):05d}.arrow"
        file = HashingFile(self._folder / name)
        try:
            write_shard(file, self._image, self._pixels[: self._used], self._labels[: self._used])
        finally:
            file.close()
        cold = freeze(self._folder, name) if self._cold else None
        self._shards.append(ShardFile(file=name, rows=self._used, bytes=file.bytes, sha256=file.sha256, cold=cold))
        self._used = 0


def write_shard(
    sink: Sink,
    image: ImageShape,
    pixels: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
) -> None:
    """Write one shard: pixels (N, C*H*W) and labels (N,), both C-contiguous, as a single record batch.

    The image column starts at a multiple of 64 bytes in the file: rows of whole cache lines stay whole.
    """
    padding = -_body_offset(image) % _ALIGNMENT
    batch = _record_batch(image, pixels, labels, padding)
    with pa.ipc.new_file(cast(pa.NativeFile, sink), batch.schema) as writer:
        writer.write_batch(batch)


def _record_batch(
    image: ImageShape, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], padding: int
) -> pa.RecordBatch:
    # Arrow aligns buffers relative to the body; a filler in the schema's metadata moves the body itself.
    schema = shard_schema(image).with_metadata({"image": str(image), "padding": " " * padding})
    kind = pa.binary(image.bytes)
    column = pa.FixedSizeBinaryArray.from_buffers(kind, len(labels), [None, pa.py_buffer(pixels.data)])
    return pa.record_batch([column, pa.array(labels)], schema=schema)


def _body_offset(image: ImageShape) -> int:
    """Where the first column would start in a file without padding."""
    pixels = np.zeros((1, image.bytes), dtype=np.uint8)
    sink = pa.BufferOutputStream()
    batch = _record_batch(image, pixels, np.zeros(1, dtype=np.int64), padding=0)
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
