"""What writing a folder atomically needs: temporary siblings, durable renames, clear errors."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dbtrain.errors import UserError
from dbtrain.local_folders import sync_folder

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a file is in the way",
    errno.EEXIST: "a file is in the way",
    errno.ENOTEMPTY: "it was filled meanwhile",
}


def unwritable(error: OSError, field: str, path: Path) -> BaseException:
    """What to raise instead of `error`: a UserError where the user's disk is the reason, else itself."""
    reason = _REASONS.get(error.errno or 0)
    if reason is None:
        return error
    return UserError(f"cannot be written: {reason}", field=field, value=path, mend="choose another place or make room")


@contextlib.contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """A temporary sibling of `final`, removed on the way out unless it was renamed.

    Leftovers of processes of this machine that were killed are removed first.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.partial-{socket.gethostname()}-"
    for leftover in final.parent.glob(f"{glob.escape(prefix)}*"):
        owner = leftover.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=final.parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def publish(partial: Path, final: Path, *, replace: bool) -> None:
    """Rename a finished folder to its final name, durably.

    Raises:
        OSError: the final name is taken and is not to be replaced; whatever stood there still stands.
    """
    sync_folder(partial)
    if replace and final.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old-", dir=final.parent))
        final.rename(old)
        try:
            partial.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old)
    else:
        partial.rename(final)
    sync_folder(final.parent)
