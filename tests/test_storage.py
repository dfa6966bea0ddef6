from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from pyarrow import fs

from dbtrain.errors import UserError
from dbtrain.storage import REPLACED, TEMPORARY, ArrowStorage, LocalStorage, Storage, temporary_name


@pytest.fixture(params=["local", "fsspec", "mock"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """One storage of each kind: this machine's, a Python filesystem, and a native one that is not local."""
    if request.param == "local":
        return Storage.open(tmp_path / "run")
    if request.param == "mock":
        return Storage.open("mock:///runs/a")
    root = f"/{uuid.uuid4().hex}"
    filesystem = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    return ArrowStorage(filesystem, root, f"memory://{root}")


def test_files_and_folders(storage: Storage) -> None:
    assert storage.list() == []
    assert not storage.exists("deep/b.txt")
    storage.write_atomic("deep/b.txt", b"one")
    storage.write_atomic("deep/b.txt", b"two")
    storage.write_atomic("deep/a.txt", "zwölf".encode())
    assert storage.list("deep") == ["a.txt", "b.txt"]
    assert storage.read_bytes("deep/b.txt") == b"two"
    assert storage.sub("deep").read_text("a.txt") == "zwölf"
    assert storage.sub("deep").uri == f"{storage.uri}/deep"
    storage.remove_tree("deep/a.txt")
    storage.remove_tree("nothing")
    assert storage.list("deep") == ["b.txt"]
    storage.remove_tree("deep")
    assert not storage.exists("deep/b.txt")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("deep/b.txt")


def test_append_line_ends_a_torn_line_first(storage: Storage) -> None:
    storage.append_line("log/a.jsonl", "1")
    storage.append_line("log/a.jsonl", "2")
    assert storage.read_text("log/a.jsonl") == "1\n2\n"
    storage.write_atomic("log/a.jsonl", b"1\nto")
    storage.append_line("log/a.jsonl", "3")
    assert storage.read_text("log/a.jsonl") == "1\nto\n3\n"


def test_commit_folder_replaces(storage: Storage) -> None:
    storage.write_atomic("final/old", b"old")
    storage.write_atomic(".tmp-x/new", b"new")
    storage.write_atomic(".tmp-x/other", b"other")
    storage.commit_folder(".tmp-x", "final")
    assert storage.list("final") == ["new", "other"]
    assert storage.read_bytes("final/new") == b"new"
    assert storage.list() == ["final"]


def test_many_commit_the_same_folder(tmp_path: Path) -> None:
    """Two verbs may assemble one run at the same time."""

    def commit(number: int) -> None:
        storage = LocalStorage(tmp_path)
        for _ in range(40):
            folder = temporary_name("final")
            storage.write_atomic(f"{folder}/a", str(number).encode())
            storage.write_atomic(f"{folder}/b", str(number).encode())
            storage.commit_folder(folder, "final")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(commit, range(4)))
    assert os.listdir(tmp_path) == ["final"]
    assert (tmp_path / "final/a").read_bytes() == (tmp_path / "final/b").read_bytes()


def test_commit_folder_replaces_a_file(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    storage.write_atomic("final", b"in the way")
    storage.write_atomic(".tmp-x/new", b"new")
    storage.commit_folder(".tmp-x", "final")
    assert storage.read_bytes("final/new") == b"new"
    assert storage.list() == ["final"]


def test_a_frozen_process_does_not_hold_up_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbtrain.local_folders.LOCK_PATIENCE", 0.1)
    storage = Storage.open(tmp_path)
    storage.write_atomic(".tmp-x/new", b"new")
    frozen = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(frozen, fcntl.LOCK_EX)
    storage.commit_folder(".tmp-x", "final")
    os.close(frozen)
    assert storage.list() == ["final"]


@pytest.mark.parametrize("source", [".tmp-x", "final/inner"])  # the second vanishes when final is set aside
def test_commit_of_a_folder_that_vanished_keeps_the_old_one(tmp_path: Path, source: str) -> None:
    storage = Storage.open(tmp_path)
    storage.write_atomic("final/old", b"old")
    storage.write_atomic("final/inner/new", b"new")
    with pytest.raises(FileNotFoundError):
        storage.commit_folder(source, "final")
    assert storage.read_bytes("final/old") == b"old"
    assert storage.list() == ["final"]


def test_open_knows_local_paths(tmp_path: Path) -> None:
    for where in (tmp_path, str(tmp_path), tmp_path.as_uri()):
        storage = Storage.open(where)
        assert storage.local_path == tmp_path
        assert Storage.open(storage.uri).local_path == tmp_path
    assert Storage.open("mock:///a").local_path is None


def test_uri_options_stay_behind_the_path() -> None:
    storage = Storage.open("s3://bucket/runs?region=eu-west-1&scheme=http")
    assert storage.sub("a/b").uri == "s3://bucket/runs/a/b?region=eu-west-1&scheme=http"


@pytest.mark.parametrize("where", ["nosuch://host/path", "s3://bucket/path?region=eu-west-1&nosuch=1"])
def test_open_refuses_what_pyarrow_cannot_open(where: str) -> None:
    with pytest.raises(UserError, match=re.escape(where)):
        Storage.open(where)


def test_writing_below_a_file_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    storage = Storage.open(tmp_path / "file" / "run")
    for write in (
        lambda: storage.write_atomic("a", b"x"),
        lambda: storage.append_line("a", "x"),
    ):
        with pytest.raises(UserError, match=str(tmp_path / "file" / "run" / "a")) as caught:
            write()
        assert caught.value.mend
    assert storage.list() == []
    assert not storage.exists("a")


def test_a_full_device_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(UserError, match=str(tmp_path / "log")):
        Storage.open(tmp_path).append_line("log", "x")


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """As on a disk that becomes full, the file may grow by a part of the line alone."""
    storage = Storage.open(tmp_path)
    storage.append_line("log", "first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(OSError, match="File too large"):
            storage.append_line("log", "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert storage.read_text("log") == "first\n"


def test_failed_write_leaves_no_trace(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "name").mkdir()  # a file cannot be renamed over a folder
    with pytest.raises(UserError, match="name"):
        storage.write_atomic("name", b"x")
    assert storage.list() == ["name"]


def test_unfinished_names_are_told_apart() -> None:
    assert REPLACED.startswith(TEMPORARY)
