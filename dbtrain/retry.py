"""Trying again what failed by accident: a connection that was reset, a file handle that went stale.

What would fail the same way a second time (a file that is not there, a right that is missing) is never tried again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

TRIES = 5
"""How often something is tried before its error counts."""
FIRST_WAIT = 0.05
"""Seconds before the second try; each further wait is twice as long."""

# What a network filesystem that is mounted here says of a server or a link in trouble.
_TRANSIENT = (
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
)
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
# pyarrow raises a bare OSError for a right that an object store refuses; only its text tells.
_REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def may_pass(error: OSError) -> bool:
    """Whether an error of a filesystem mounted on this machine may be gone a moment later."""
    return error.errno in _TRANSIENT


def may_pass_remotely(error: OSError) -> bool:
    """Whether an error of a remote filesystem may be gone a moment later: their clients number few of them."""
    return not isinstance(error, _FINAL) and not any(word in str(error) for word in _REFUSED)


def retried(action: Callable[[], _T], what: str, transient: Callable[[OSError], bool]) -> _T:
    """The result of `action`, which is tried up to `TRIES` times while its errors are transient.

    Args:
        action: may be carried out again after it failed.
        what: names it in the log, where the first error is a warning.
        transient: whether an error may be gone a moment later.

    Raises:
        OSError: the first error that is not transient, or the last one.
    """
    wait = FIRST_WAIT
    for _ in range(TRIES - 1):
        try:
            return action()
        except OSError as error:
            if not transient(error):
                raise
            if wait == FIRST_WAIT:
                _log.warning("%s: %s; trying again", what, " ".join(str(error).split()))
        time.sleep(wait)
        wait *= 2
    return action()


def retried_pieces(
    open_file: Callable[[], BinaryIO], size: int, what: str, transient: Callable[[OSError], bool]
) -> Iterator[bytes]:
    """The content of a file, `size` bytes at a time; after a transient error it is opened again and read on.

    Raises:
        OSError: as `retried` does; the tries are counted anew with every piece.
    """
    file: BinaryIO | None = None
    done = 0

    def read() -> bytes:
        nonlocal file
        try:
            if file is None:
                file = open_file()
                file.seek(done)
            return file.read(size)
        except OSError:
            # The handle may be as broken as the connection.
            broken, file = file, None
            if broken is not None:
                with contextlib.suppress(OSError):
                    broken.close()
            raise

    try:
        while piece := retried(read, what, transient):
            done += len(piece)
            yield piece
    finally:
        if file is not None:
            file.close()
