"""Reading through errors that pass, and not waiting for those that stay."""

from __future__ import annotations

import errno
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from dbtrain.retry import TRIES, may_pass, retried
from dbtrain.storage import ArrowStorage, Storage


class Shaky(MemoryFileSystem):
    """A filesystem whose requests fail the next `failures` times, with `error`."""

    cachable = False

    def __init__(self, error: Callable[[], OSError], failures: int = 0):
        super().__init__()
        self.error = error
        self.failures = failures
        self.asked = 0

    def ask(self) -> None:
        self.asked += 1
        if self.failures > 0:
            self.failures -= 1
            raise self.error()

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.ask()
        return ShakyFile(super().open(path, mode, **options), self) if mode == "rb" else super().open(path, mode)

    def info(self, path: str, **options: Any) -> Any:
        self.ask()
        return super().info(path, **options)

    def isdir(self, path: str) -> bool:
        return MemoryFileSystem.info(self, path)["type"] == "directory"  # fsspec's own takes any error for a no

    def find(self, path: str, **options: Any) -> Any:
        self.ask()
        return super().find(path, **options)


class ShakyFile:
    """A file of it: what is read from it may fail as well."""

    def __init__(self, file: Any, home: Shaky):
        self._file = file
        self._home = home

    def read(self, size: int = -1) -> Any:
        self._home.ask()
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def lost() -> OSError:
    return OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56")


@pytest.fixture
def shaky() -> Shaky:
    return Shaky(lost)


@pytest.fixture
def storage(shaky: Shaky) -> Storage:
    root = f"/{uuid.uuid4().hex}"
    made = ArrowStorage(fs.PyFileSystem(fs.FSSpecHandler(shaky)), root, f"memory://{root}")
    made.write_atomic("deep/a.txt", b"content")
    return made


READS: dict[str, tuple[Callable[[Storage], object], object]] = {
    "read_bytes": (lambda storage: storage.read_bytes("deep/a.txt"), b"content"),
    "exists": (lambda storage: storage.exists("deep/a.txt"), True),
    "list": (lambda storage: storage.list("deep"), ["a.txt"]),
    "pieces": (lambda storage: b"".join(storage.read_pieces("deep/a.txt")), b"content"),
}


@pytest.mark.parametrize("what", READS)
@pytest.mark.parametrize("failures", [1, 3])
def test_a_transient_error_is_survived_and_told_once(
    shaky: Shaky, storage: Storage, what: str, failures: int, caplog: pytest.LogCaptureFixture
) -> None:
    read, expected = READS[what]
    shaky.failures = failures
    assert read(storage) == expected
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert storage.uri in told
    assert "NETWORK_CONNECTION" in told


@pytest.mark.parametrize("what", READS)
def test_an_error_that_stays_comes_out(shaky: Shaky, storage: Storage, what: str) -> None:
    shaky.failures = 1000
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        READS[what][0](storage)


@pytest.mark.parametrize(
    "error",
    [
        lambda: FileNotFoundError(errno.ENOENT, "no such file"),
        lambda: PermissionError(errno.EACCES, "denied"),
        lambda: OSError("AWS Error ACCESS_DENIED during GetObject operation: No response body."),
    ],
)
def test_a_mistake_is_not_tried_again(shaky: Shaky, storage: Storage, error: Callable[[], OSError]) -> None:
    shaky.error, shaky.failures = error, 1
    before = shaky.asked
    with pytest.raises(type(error())):
        storage.read_bytes("deep/a.txt")
    assert shaky.asked == before + 1


def test_pieces_go_on_where_the_connection_broke(
    shaky: Shaky, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More breaks in all than one piece may have, each in the middle of the file."""
    monkeypatch.setattr("dbtrain.storage.PIECE_BYTES", 10)
    content = os.urandom(100)
    storage.write_atomic("b", content)
    received = b""
    for piece in storage.read_pieces("b"):
        received += piece
        shaky.failures = 2
    assert received == content


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_a_mounted_filesystem_in_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The real calls of the system, made to fail first as an NFS mount does: nothing here can break a real one."""
    storage = Storage.open(tmp_path)
    storage.write_atomic("deep/a.txt", b"content")
    left = {"open": 2, "stat": 2, "listdir": 2}

    def shaken(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if left[name] > 0 and str(arguments[0]).startswith(str(tmp_path)):
                left[name] -= 1
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(Path, "stat", shaken("stat", Path.stat))
    monkeypatch.setattr(Path, "read_bytes", shaken("open", Path.read_bytes))
    monkeypatch.setattr(os, "listdir", shaken("listdir", os.listdir))
    assert storage.exists("deep/a.txt")
    assert storage.read_bytes("deep/a.txt") == b"content"
    assert storage.list("deep") == ["a.txt"]
    assert set(left.values()) == {0}


def test_what_is_not_there_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    storage = Storage.open(tmp_path)
    assert not storage.exists("nothing")
    assert not storage.exists("file/below")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nothing")
    with pytest.raises(FileNotFoundError):
        list(storage.read_pieces("nothing"))
    assert not caplog.records


def test_tries_are_bounded() -> None:
    tried = []

    def fail() -> None:
        tried.append(1)
        raise OSError(errno.EIO, "bad sector")

    with pytest.raises(OSError, match="bad sector"):
        retried(fail, "a file", may_pass)
    assert len(tried) == TRIES
