"""Folders of this machine: made and named durably, replaced by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_PATIENCE = 20.0
"""Seconds that a process may take to replace a folder before others do so beside it."""


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes and threads that replace something in `folder` waiting, where its filesystem has locks.

    Not for ever: whoever holds the lock for `LOCK_PATIENCE` seconds is frozen, and shall freeze nobody else.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + LOCK_PATIENCE
        with contextlib.suppress(OSError):
            while not _locked(descriptor) and time.monotonic() < end:
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Lock an open folder unless somebody else has; raises OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_folder(path: Path) -> None:
    """Create a folder and those above it, durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_folder(path: Path) -> None:
    """Make the names in a local folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
