"""One copy of the shards on every machine: `data.cache`.

```
<cache>/<digest of the data>/        manifest.json  train-00000.arrow ...  (tokenizer.json)
<cache>/.<digest of the data>.lock   held by the process that copies
```
Shards are mapped into memory, so they have to be files, and the workers of a machine that map the same files share
its page cache. Whoever comes first copies them, under a lock that the system takes back if the process dies; the
others wait. A copy has its name only when every byte of it has been compared with the digests of the manifest, and
it is compared again, as far as the files have changed since, whenever it is opened: what is damaged is copied anew.

The source is asked for nothing once the copy is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dbtrain.data.cold import restore_shard
from dbtrain.data.files import partial_folder, publish, unwritable
from dbtrain.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, ShardFile
from dbtrain.data.shard_writer import COLD_FOLDER, HashingFile, write_file
from dbtrain.data.shards import verify_copied, verify_folder
from dbtrain.data_config import DataConfig
from dbtrain.errors import CorruptData, UserError
from dbtrain.storage import Storage

STREAMS = 4
"""Shards that are copied at the same time: one connection to an object store leaves most of a network unused."""

_log = logging.getLogger(__name__)


def local_shards(data: DataConfig, sha256: str) -> Path:
    """The folder of this machine that `ShardSet.open` maps; where shards go through the cache, their verified copy.

    Waits while another process copies the same shards.

    Args:
        data: where they are.
        sha256: digest of the data (`DatasetFacts.sha256`), by which a copy is found.

    Raises:
        UserError: they cannot be read there or written here, or are other ones.
        CorruptData: the shards that are to be copied are damaged.
    """
    if not data.cached:
        return data.shards
    cache = data.cache_folder
    folder = cache / sha256
    try:
        if _problem(folder, sha256) is None:
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f".{sha256}.lock") as alone:
            problem = _problem(folder, sha256)
            if problem is not None:
                if folder.exists():
                    _log.warning("%s is copied anew: %s", folder, problem)
                _fill(Storage.open(data.location), folder, sha256, alone)
    except OSError as error:
        raise unwritable(error, "data.cache", cache) from None
    return folder


def read_manifest(data: DataConfig) -> Manifest:
    """The manifest of the shards where they were prepared.

    Raises:
        UserError: there are none, or they cannot be read.
        CorruptData: it is not a manifest.
    """
    return _manifest_in(Storage.open(data.location))


def _manifest_in(source: Storage) -> Manifest:
    path = source.sub(MANIFEST_FILE).uri
    try:
        content = source.read_bytes(MANIFEST_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"holds no prepared data ({MANIFEST_FILE} is missing)",
            field="data.path",
            value=source.uri,
            mend="copy a folder there that `dbtrain prepare` made",
        ) from None
    except OSError as error:
        raise _unreadable(error, path) from None
    return Manifest.parse(content, source.uri, path)


def _problem(folder: Path, sha256: str) -> str | None:
    """Why the copy cannot be used; None when it is there, with the bytes it has to have."""
    try:
        manifest = Manifest.load(folder)
        verify_folder(folder, manifest)
    except (UserError, OSError) as error:
        return str(error)
    return None if manifest.facts().sha256 == sha256 else f"its {MANIFEST_FILE} is that of other data"


def _fill(source: Storage, folder: Path, sha256: str, alone: bool) -> None:
    """Copy the shards to `folder`, which appears under its name when they are all there, right and durable."""
    manifest = _manifest_in(source)
    found = manifest.facts().sha256
    if found != sha256:
        raise UserError(
            f"holds other shards than are needed: their digest is {found[:12]}..., not {sha256[:12]}...",
            field="data.path",
            value=source.uri,
            mend="every machine has to see the data that the run was planned with",
        )
    if alone:
        # Nobody else is copying, so whatever others left was left by the dead, of whichever machine.
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)  # who has it mapped keeps it
    size = sum(shard.bytes for shard in manifest.shards)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise UserError(
            f"the shards need {size:,} bytes, and {free:,} are free there",
            field="data.cache",
            value=folder.parent,
            mend="choose another place or make room",
        )
    _log.info("copying %d bytes of shards from %s to %s", size, source.uri, folder)
    with partial_folder(folder) as partial:
        _copy_all(source, manifest, partial)
        try:
            verify_copied(partial, manifest)
        except CorruptData as error:
            raise _damaged(source, Path(str(error.value)).name, error.problem) from None
        write_file(partial / MANIFEST_FILE, manifest.to_json().encode())
        try:
            publish(partial, folder, replace=False)
        except OSError as error:
            # Where the filesystem has no locks, another process may have been faster.
            if alone or error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or _problem(folder, sha256):
                raise
    _log.info("the shards are in %s", folder)


def _copy_all(source: Storage, manifest: Manifest, to: Path) -> None:
    copiers = ThreadPoolExecutor(STREAMS, thread_name_prefix="dbtrain-copy")
    try:
        list(copiers.map(lambda shard: _copy_shard(source, shard, to), manifest.shards))
        if manifest.text is not None:
            try:
                _copy(source, TOKENIZER_FILE, to, None, manifest.text.tokenizer_sha256)
            except FileNotFoundError:
                raise _missing(source, TOKENIZER_FILE) from None
    finally:
        copiers.shutdown(cancel_futures=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(to / COLD_FOLDER)


def _copy_shard(source: Storage, shard: ShardFile, to: Path) -> None:
    """Copy one shard, or, where it was deleted to save room, restore it from its cold copy."""
    try:
        _copy(source, shard.file, to, shard.bytes, shard.sha256)
    except FileNotFoundError:
        cold = shard.cold
        if cold is None:
            raise _missing(source, shard.file) from None
    else:
        return
    (to / COLD_FOLDER).mkdir(exist_ok=True)
    try:
        _copy(source, cold.file, to, cold.bytes, cold.sha256)
    except FileNotFoundError:
        raise _missing(source, shard.file) from None
    restore_shard(to, shard)


def _copy(source: Storage, name: str, to: Path, size: int | None, sha256: str) -> None:
    """Copy one file and compare it with its digest. Raises FileNotFoundError when it is not in the source."""
    file: HashingFile | None = None
    try:
        for piece in _pieces(source, name):
            if file is None:  # opened only when there is something to copy
                file = HashingFile(to / name)
            file.write(piece)
    finally:
        if file is not None:
            file.close()
    copied = 0 if file is None else file.bytes
    if size is not None and copied != size:
        raise _damaged(source, name, f"has {copied} bytes, the manifest says {size}")
    if file is None or file.sha256 != sha256:
        raise _damaged(source, name, "its bytes have changed since it was prepared (SHA-256 differs)")


def _pieces(source: Storage, name: str) -> Iterator[bytes]:
    """What `Storage.read_pieces` gives; errors of the source are not taken for those of the disk that is written."""
    try:
        yield from source.read_pieces(name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(error, source.sub(name).uri) from None


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Keep the other processes that want to copy the same waiting; gives False where there are no locks.

    The system lets go when the process ends, however it ends.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process copies the shards; waiting for it (%s)", lock)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            held = False
        yield held
    finally:
        os.close(descriptor)


def _unreadable(error: OSError, path: str) -> UserError:
    return UserError(
        f"cannot be read: {error.strerror or ' '.join(str(error).split())}",
        field="data.path",
        value=path,
        mend="check the address, your credentials and the network",
    )


def _missing(source: Storage, name: str) -> UserError:
    return UserError(
        "is missing", field="data.path", value=source.sub(name).uri, mend="copy the whole prepared folder there again"
    )


def _damaged(source: Storage, name: str, problem: str) -> CorruptData:
    mend = "copy the prepared folder there again"
    return CorruptData(problem, field="data.path", value=source.sub(name).uri, mend=mend)
