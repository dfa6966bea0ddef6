"""One driver a run directory: a second one would only take blocks away from the first."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator

from dbtrain.errors import UserError
from dbtrain.storage import Storage

LOCK = "driver.lock"
_GLANCE = 0.5  # seconds


@contextlib.contextmanager
def driver_lock(storage: Storage) -> Iterator[None]:
    """Hold the run directory for this process. The system lets go when the process ends, however it ends.

    Object stores and filesystems without locks are not held; there the attempt numbers alone keep late
    writers out.

    Raises:
        UserError: another driver holds it, or the directory cannot be written.
    """
    if storage.local_path is None:
        yield
        return
    path = storage.local_path / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", field="--run", value=storage.uri) from None
    try:
        try:
            _take(handle)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"is being trained by {holder}",
                field="--run",
                value=storage.uri,
                mend="wait for it, stop it, or choose another directory",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        else:
            with contextlib.suppress(OSError):  # who holds it is only told, on a full disk it is not
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _take(handle: int) -> None:
    """Lock it; whoever only looks at the lock holds it for a moment too."""
    deadline = time.monotonic() + _GLANCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_GLANCE / 10)
        else:
            return


def driver_at_work(storage: Storage) -> bool:
    """Whether some process holds the run directory; where nobody can tell, the answer is yes."""
    if storage.local_path is None:
        return True
    try:
        handle = os.open(storage.local_path / LOCK, os.O_RDONLY)  # a run of others may be read alone
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
