"""One driver a run directory: a second one would only take blocks away from the first."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator

from dbtrain.errors import UserError
from dbtrain.storage import Storage

LOCK = "driver.lock"


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
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
