"""Bringing shards back from their compressed copies."""

from __future__ import annotations

from pathlib import Path

import zstandard

from dbtrain.data.files import partial_folder, unwritable
from dbtrain.data.manifest import Manifest, ShardFile
from dbtrain.data.shard_writer import HashingFile
from dbtrain.data.shards import file_sha256
from dbtrain.errors import CorruptData, UserError
from dbtrain.local_folders import sync_folder

_COPY_BYTES = 1 << 20


def restore_cold(folder: Path) -> list[str]:
    """Restore the shards that are missing in `folder` from their cold copies. Returns their file names.

    Raises:
        UserError: a shard is missing and has no cold copy, or there is no room to restore it.
        CorruptData: a cold copy is damaged.
    """
    manifest = Manifest.load(folder)
    restored = []
    for shard in manifest.shards:
        if not (folder / shard.file).exists():
            restore_shard(folder, shard)
            restored.append(shard.file)
    return restored


def restore_shard(folder: Path, shard: ShardFile) -> None:
    """Restore one shard from its cold copy in `folder`; raises as `restore_cold` does."""
    cold = None if shard.cold is None else folder / shard.cold.file
    if cold is None or shard.cold is None or not cold.exists():
        raise UserError(
            "the shard is missing and has no cold copy",
            field="shard",
            value=folder / shard.file,
            mend="prepare the data again with `dbtrain prepare --overwrite`",
        )
    damaged = CorruptData(
        "the cold copy is damaged",
        field="shard",
        value=cold,
        mend="prepare the data again with `dbtrain prepare --overwrite`",
    )
    if cold.stat().st_size != shard.cold.bytes or file_sha256(cold) != shard.cold.sha256:
        raise damaged
    try:
        # A folder of its own: runs that start at once may restore the same shard.
        with partial_folder(folder / shard.file) as scratch:
            file = HashingFile(scratch / shard.file)
            try:
                with cold.open("rb") as source:
                    for chunk in zstandard.ZstdDecompressor().read_to_iter(source, read_size=_COPY_BYTES):
                        file.write(chunk)
            finally:
                file.close()
            if file.sha256 != shard.sha256:
                raise damaged
            (scratch / shard.file).replace(folder / shard.file)
        sync_folder(folder)
    except OSError as error:
        raise unwritable(error, "data.path", folder) from None
