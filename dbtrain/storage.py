"""Where a run directory lives: a local path, or any filesystem that pyarrow opens by URI (S3, GCS, Azure).

A reader never sees half a file. Locally, bytes go to a temporary name, are synced, and are renamed into
place. Object stores have no rename, but one put makes an object appear whole; a folder there is committed by
the file that is put last and names the others (see `dbtrain.training.checkpoint`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from dbtrain.errors import NoRoom, UserError

TEMPORARY = ".tmp-"
"""What the name of every file and folder that is not finished begins with."""
REPLACED = ".tmp-old-"
"""What the name of a folder begins with while `commit_folder` puts another in its place."""
LOCK_PATIENCE = 20.0
"""Seconds that a process may take to replace a folder before others do so beside it."""

_MENDS = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "the quota is used up: free some space, or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "give yourself the right to write there, or choose another folder",
    errno.EPERM: "give yourself the right to write there, or choose another folder",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EEXIST: "a part of the path is a file: choose another folder",
    errno.EISDIR: "a folder has that name: choose another",
    errno.ENAMETOOLONG: "choose a shorter path",
}
# Object stores that make folders out of the names of their objects.
_FOLDERLESS = ("s3", "gcs", "abfs")


def temporary_name(name: str) -> str:
    """A name nobody else uses, to write `name` under until it is whole."""
    return f"{TEMPORARY}{name}-{uuid.uuid4().hex[:12]}"


class Storage(ABC):
    """A folder of files, addressed by relative paths with forward slashes."""

    uri: str
    """What `Storage.open` takes to come back here: an absolute path, or a URI."""

    @staticmethod
    def open(where: str | Path) -> Storage:
        """The folder at a local path or a URI such as s3://bucket/runs/a; it need not exist yet.

        Raises:
            UserError: the URI's scheme or address is one that pyarrow cannot open.
        """
        if isinstance(where, Path) or "://" not in where:
            return LocalStorage(Path(where).expanduser())
        try:
            filesystem, root = fs.FileSystem.from_uri(where)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise UserError(
                f"cannot open {where}: {_one_line(error)}",
                value=where,
                mend="give a local path or a URI that pyarrow knows: file, s3, gs, abfs or hdfs",
            ) from None
        if isinstance(filesystem, fs.LocalFileSystem):
            return LocalStorage(Path(root))
        return ArrowStorage(filesystem, root, where)

    @property
    def local_path(self) -> Path | None:
        """The folder as a path of this machine; None on other filesystems."""
        return None

    @abstractmethod
    def read_bytes(self, rel: str) -> bytes:
        """The content of a file. Raises FileNotFoundError when there is none."""

    def read_text(self, rel: str) -> str:
        """The content of a UTF-8 file. Raises FileNotFoundError when there is none."""
        return self.read_bytes(rel).decode()

    @abstractmethod
    def write_atomic(self, rel: str, data: bytes) -> None:
        """Create or replace a file, and the folders above it; durable when this returns.

        Raises:
            UserError: no space, no permission, a read-only filesystem; what stood there is unchanged.
        """

    @abstractmethod
    def append_line(self, rel: str, text: str) -> None:
        """Add one line to a file; a line that a dead writer left torn is ended first.

        A single writer at a time is assumed. Raises UserError as `write_atomic` does.
        """

    @abstractmethod
    def exists(self, rel: str) -> bool:
        """Whether a file or folder of that name is there."""

    @abstractmethod
    def list(self, rel: str = "") -> list[str]:
        """Sorted names of what a folder holds, unfinished things included; empty when there is no folder."""

    @abstractmethod
    def remove_tree(self, rel: str) -> None:
        """Remove a file, or a folder with all it holds; nothing happens when there is none.

        Raises UserError as `write_atomic` does.
        """

    @abstractmethod
    def sub(self, rel: str) -> Storage:
        """The storage of a folder inside this one."""

    @abstractmethod
    def commit_folder(self, tmp_rel: str, final_rel: str) -> None:
        """Give a finished folder its final name, in place of a folder that has it.

        Locally a rename. A process that dies while replacing may leave the old folder under `REPLACED` + its
        name, and none under the name itself. On object stores the files are moved one by one, in order.
        """


class LocalStorage(Storage):
    """A folder of this machine, or of a network filesystem mounted on it."""

    def __init__(self, root: Path):
        self._root = root.absolute()
        self.uri = str(self._root)

    @property
    def local_path(self) -> Path | None:
        return self._root

    def read_bytes(self, rel: str) -> bytes:
        return (self._root / rel).read_bytes()

    def write_atomic(self, rel: str, data: bytes) -> None:
        path = self._root / rel
        temporary = path.with_name(temporary_name(path.name))
        with _write_errors(path):
            _make_folder(path.parent)
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            sync_folder(path.parent)

    def append_line(self, rel: str, text: str) -> None:
        path = self._root / rel
        with _write_errors(path):
            _make_folder(path.parent)
            with path.open("a+b", buffering=0) as file:
                if end := file.seek(0, os.SEEK_END):
                    file.seek(end - 1)
                    torn = file.read(1) != b"\n"
                else:
                    torn = False
                data = (b"\n" if torn else b"") + text.encode() + b"\n"
                try:
                    # A short write means that the device is full; the next write says so.
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(end)  # whoever tries again writes the whole line
                    raise

    def exists(self, rel: str) -> bool:
        return (self._root / rel).exists()

    def list(self, rel: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self._root / rel))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove_tree(self, rel: str) -> None:
        path = self._root / rel
        with _write_errors(path):
            _remove(path)

    def sub(self, rel: str) -> LocalStorage:
        return LocalStorage(self._root / rel)

    def commit_folder(self, tmp_rel: str, final_rel: str) -> None:
        source, target = self._root / tmp_rel, self._root / final_rel
        aside = target.with_name(REPLACED + target.name)
        with _write_errors(target):
            _make_folder(target.parent)
            sync_folder(source)
        with _write_errors(target), _one_at_a_time(target.parent):
            if target.exists():
                _remove(aside)
                target.rename(aside)
            try:
                source.rename(target)
            except BaseException:
                if aside.exists():
                    aside.rename(target)
                raise
            sync_folder(target.parent)
            _remove(aside)


class ArrowStorage(Storage):
    """A folder of a pyarrow filesystem that is not this machine's."""

    def __init__(self, filesystem: fs.FileSystem, root: str, uri: str):
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self.uri = uri

    def read_bytes(self, rel: str) -> bytes:
        with self._filesystem.open_input_stream(self._path(rel)) as stream:
            return bytes(stream.read())

    def write_atomic(self, rel: str, data: bytes) -> None:
        path = self._path(rel)
        with _write_errors(self._uri_of(rel), every=True):
            if self._filesystem.type_name not in _FOLDERLESS:
                self._filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(data)

    def append_line(self, rel: str, text: str) -> None:
        # Object stores cannot append: the file is read and put again.
        before = self.read_bytes(rel) if self.exists(rel) else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        self.write_atomic(rel, before + text.encode() + b"\n")

    def exists(self, rel: str) -> bool:
        info = self._filesystem.get_file_info(self._path(rel))
        return bool(info.type != fs.FileType.NotFound)

    def list(self, rel: str = "") -> list[str]:
        infos = self._filesystem.get_file_info(fs.FileSelector(self._path(rel), allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def remove_tree(self, rel: str) -> None:
        path = self._path(rel)
        kind = self._filesystem.get_file_info(path).type
        with _write_errors(self._uri_of(rel), every=True):
            if kind == fs.FileType.Directory:
                self._filesystem.delete_dir(path)
            elif kind != fs.FileType.NotFound:
                self._filesystem.delete_file(path)

    def sub(self, rel: str) -> ArrowStorage:
        return ArrowStorage(self._filesystem, self._path(rel), self._uri_of(rel))

    def commit_folder(self, tmp_rel: str, final_rel: str) -> None:
        with _write_errors(self._uri_of(final_rel), every=True):
            self.remove_tree(final_rel)
            self._filesystem.create_dir(self._path(final_rel), recursive=True)
            for name in self.list(tmp_rel):
                self._filesystem.move(self._path(f"{tmp_rel}/{name}"), self._path(f"{final_rel}/{name}"))
            self.remove_tree(tmp_rel)

    def _path(self, rel: str) -> str:
        return f"{self._root}/{rel}" if rel else self._root

    def _uri_of(self, rel: str) -> str:
        path, mark, options = self.uri.partition("?")
        return f"{path.rstrip('/')}/{rel}{mark}{options}"


@contextlib.contextmanager
def _write_errors(path: Path | str, every: bool = False) -> Iterator[None]:
    """Turn what the environment refuses into a UserError; with `every`, any OSError of a remote store."""
    try:
        yield
    except OSError as error:
        if not every and error.errno not in _MENDS:
            raise
        reason = error.strerror or _one_line(error)
        mend = _MENDS.get(error.errno or 0, "check the address, your credentials and the network")
        kind = NoRoom if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
        raise kind(f"cannot write {path}: {reason}", value=str(path), mend=mend) from error


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
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


def _make_folder(path: Path) -> None:
    """Create a folder and those above it, durably."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    sync_folder(path.parent)


def _remove(path: Path) -> None:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
