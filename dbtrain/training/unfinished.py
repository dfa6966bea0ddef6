"""The files of a checkpoint that is being written: they become one in a single moment, or disappear."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import zstandard
from torch import Tensor

from dbtrain.errors import UserError
from dbtrain.storage import Storage, temporary_name

MANIFEST = "MANIFEST"
"""The file that names the others, with their sizes and digests."""
_SAMPLE_BYTES = 1 << 20
_SAMPLE_PIECES = 16
_WORTHWHILE = 0.9


class UnfinishedCheckpoint:
    """One writer's files of one checkpoint, until they are committed or discarded."""

    def __init__(self, storage: Storage, final: str):
        self._storage = storage
        self._final = final
        renames = storage.local_path is not None
        self._folder = temporary_name(final) if renames else final
        self._prefix = "" if renames else f"{uuid.uuid4().hex[:12]}."
        self._names: list[str] = []

    def write(self, name: str, data: bytes) -> dict[str, Any]:
        """Write one file; returns its entry in the manifest."""
        unique = self._prefix + name
        self._names.append(unique)
        self._storage.write_atomic(f"{self._folder}/{unique}", data)
        return {"file": unique, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def commit(self, manifest: bytes, check_fence: Callable[[], None]) -> None:
        """Make the files the checkpoint, in place of the one of that step, if the fence still lets us."""
        if self._folder != self._final:
            self._storage.write_atomic(f"{self._folder}/{MANIFEST}", manifest)
            check_fence()
            self._storage.commit_folder(self._folder, self._final)
            return
        check_fence()
        # From here on nothing may be discarded: a put that failed with a broken connection may have arrived.
        names, self._names = self._names, []
        self._storage.write_atomic(f"{self._final}/{MANIFEST}", manifest)
        for name in self._storage.list(self._final):
            if name not in names and name != MANIFEST:
                self._storage.remove_tree(f"{self._final}/{name}")

    def discard(self) -> None:
        """Remove what was written and not committed, as far as the filesystem lets us."""
        with contextlib.suppress(OSError, UserError):
            if self._folder != self._final:
                self._storage.remove_tree(self._folder)
            for name in self._names:
                self._storage.remove_tree(f"{self._folder}/{name}")


def encode_tensors(tensors: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """The ending and the content of a file that depends on names, types, shapes and values alone, not on order or
    layout."""
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().contiguous()
        if dense.untyped_storage().data_ptr() in storages:
            dense = dense.clone()
        storages.add(dense.untyped_storage().data_ptr())
        owned[name] = dense
    data = safetensors.torch.save(owned)
    if _compresses(data):
        return "safetensors.zst", zstandard.ZstdCompressor(level=1).compress(data)
    return "safetensors", data


def _compresses(data: bytes) -> bool:
    """Whether zstd takes at least a tenth off a sample of 1 MiB, drawn evenly from the file."""
    if len(data) > _SAMPLE_BYTES:
        piece = _SAMPLE_BYTES // _SAMPLE_PIECES
        stride = (len(data) - piece) // (_SAMPLE_PIECES - 1)
        data = b"".join(data[k * stride : k * stride + piece] for k in range(_SAMPLE_PIECES))
    return len(zstandard.ZstdCompressor(level=1).compress(data)) <= _WORTHWHILE * len(data)
