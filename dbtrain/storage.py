"""Where a run directory lives: a local path, or any filesystem that pyarrow opens by URI (S3, GCS, Azure).

A reader never sees half a file. Locally, bytes go to a temporary name, are synced, and are renamed into
place. Object stores have no rename, but one put makes an object appear whole; a folder there is committed by
the file that is put last and names the others (see `dbtrain.training.checkpoint`).

Reading survives an error that passes: it is tried again for a short while (`dbtrain.retry`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar, cast

import pyarrow as pa
from pyarrow import fs

from dbtrain.errors import NoRoom, UserError
from dbtrain.local_folders import make_folder, one_at_a_time, remove, sync_folder
from dbtrain.retry import may_pass, may_pass_remotely, retried, retried_pieces

_T = TypeVar("_T")

TEMPORARY = ".tmp-"
"""What the name of every file and folder that is not finished begins with."""
REPLACED = ".tmp-old-"
"""What the name of a folder begins with while `commit_folder` puts another in its place."""
PIECE_BYTES = 8 << 20
"""What `Storage.read_pieces` reads at once; an object store is asked for so much with each request."""

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
# Where `Path.exists` says no as well.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)
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

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep others who ask for the same waiting, where the folder's filesystem has locks; the folder is made."""
        return contextlib.nullcontext()

    @abstractmethod
    def read_bytes(self, rel: str) -> bytes:
        """The content of a file. Raises FileNotFoundError when there is none."""

    def read_text(self, rel: str) -> str:
        """The content of a UTF-8 file. Raises FileNotFoundError when there is none."""
        return self.read_bytes(rel).decode()

    def read_pieces(self, rel: str) -> Iterator[bytes]:
        """The content of a file, `PIECE_BYTES` at a time. After an error that passes, reading goes on where it was.

        Raises FileNotFoundError when there is no such file.
        """
        return retried_pieces(lambda: self._open_file(rel), PIECE_BYTES, self._name(rel), self._may_pass)

    def read_from(self, rel: str, start: int) -> bytes:
        """What a file holds from byte `start` on; nothing where it is not so long.

        Raises FileNotFoundError when there is no such file.
        """

        def read() -> bytes:
            with self._open_file(rel) as file:
                if file.seek(0, os.SEEK_END) <= start:
                    return b""
                file.seek(start)
                return file.read()

        return self._retried(read, rel)

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

    @abstractmethod
    def _open_file(self, rel: str) -> BinaryIO:
        """A file, open for reading at any position."""

    @staticmethod
    @abstractmethod
    def _may_pass(error: OSError) -> bool:
        """Whether what could not be read may be readable a moment later."""

    def _retried(self, action: Callable[[], _T], rel: str) -> _T:
        return retried(action, self._name(rel), self._may_pass)

    def _name(self, rel: str) -> str:
        return f"{self.uri}: {rel}" if rel else self.uri


class LocalStorage(Storage):
    """A folder of this machine, or of a network filesystem mounted on it."""

    def __init__(self, root: Path):
        self._root = root.absolute()
        self.uri = str(self._root)

    @property
    def local_path(self) -> Path | None:
        return self._root

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with _write_errors(self._root):
            make_folder(self._root)
        with one_at_a_time(self._root):
            yield

    def read_bytes(self, rel: str) -> bytes:
        return self._retried((self._root / rel).read_bytes, rel)

    def write_atomic(self, rel: str, data: bytes) -> None:
        path = self._root / rel
        temporary = path.with_name(temporary_name(path.name))
        with _write_errors(path):
            make_folder(path.parent)
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
            make_folder(path.parent)
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
        try:
            self._retried((self._root / rel).stat, rel)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            return False
        return True

    def list(self, rel: str = "") -> list[str]:
        try:
            return sorted(self._retried(lambda: os.listdir(self._root / rel), rel))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove_tree(self, rel: str) -> None:
        path = self._root / rel
        with _write_errors(path):
            remove(path)

    def sub(self, rel: str) -> LocalStorage:
        return LocalStorage(self._root / rel)

    def commit_folder(self, tmp_rel: str, final_rel: str) -> None:
        source, target = self._root / tmp_rel, self._root / final_rel
        aside = target.with_name(REPLACED + target.name)
        with _write_errors(target):
            make_folder(target.parent)
            sync_folder(source)
        with _write_errors(target), one_at_a_time(target.parent):
            if target.exists():
                remove(aside)
                target.rename(aside)
            try:
                source.rename(target)
            except BaseException:
                if aside.exists():
                    aside.rename(target)
                raise
            sync_folder(target.parent)
            remove(aside)

    def _open_file(self, rel: str) -> BinaryIO:
        return (self._root / rel).open("rb")

    _may_pass = staticmethod(may_pass)


class ArrowStorage(Storage):
    """A folder of a pyarrow filesystem that is not this machine's."""

    def __init__(self, filesystem: fs.FileSystem, root: str, uri: str):
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self.uri = uri

    def read_bytes(self, rel: str) -> bytes:
        def read() -> bytes:
            with self._filesystem.open_input_file(self._path(rel)) as stream:
                return bytes(stream.read())

        return self._retried(read, rel)

    def write_atomic(self, rel: str, data: bytes) -> None:
        path = self._path(rel)
        with _write_errors(self._uri_of(rel), every=True):
            if self._filesystem.type_name not in _FOLDERLESS:
                self._filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
            # Left alone, pyarrow would compress what is called .zst once more.
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)

    def append_line(self, rel: str, text: str) -> None:
        # Object stores cannot append: the file is read and put again.
        before = self.read_bytes(rel) if self.exists(rel) else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        self.write_atomic(rel, before + text.encode() + b"\n")

    def exists(self, rel: str) -> bool:
        info = self._retried(lambda: self._filesystem.get_file_info(self._path(rel)), rel)
        return bool(info.type != fs.FileType.NotFound)

    def list(self, rel: str = "") -> list[str]:
        selector = fs.FileSelector(self._path(rel), allow_not_found=True)
        infos = self._retried(lambda: self._filesystem.get_file_info(selector), rel)
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

    def _open_file(self, rel: str) -> BinaryIO:
        # It has what a BinaryIO is asked for here: seek, read and close.
        return cast(BinaryIO, self._filesystem.open_input_file(self._path(rel)))

    _may_pass = staticmethod(may_pass_remotely)

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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
