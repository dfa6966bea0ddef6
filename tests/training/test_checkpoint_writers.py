from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from checkpoint_states import HookedStorage, Opener, assert_same, save_all, snapshot
from pyarrow import fs

from dbtrain.errors import UserError
from dbtrain.run_directory import BlockDirectory, StaleAttempt
from dbtrain.storage import ArrowStorage, Storage
from dbtrain.training.checkpoint import checkpoint_steps


class HookedHandler(fs.FSSpecHandler):
    """A remote filesystem that calls a function before each put."""

    hook: Callable[[str], None] | None = None

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> object:
        if self.hook is not None:
            self.hook(path)
        return super().open_output_stream(path, metadata)


def remote_block(handler: HookedHandler) -> BlockDirectory:
    root = f"/{uuid.uuid4().hex}"
    return BlockDirectory(ArrowStorage(fs.PyFileSystem(handler), root, f"memory://{root}"), 0)


def test_an_older_attempt_changes_nothing(block: BlockDirectory, open_store: Opener) -> None:
    block.claim(1)
    old = open_store(block, attempt=1)
    save_all(old, 1)
    block.claim(2)
    save_all(open_store(block, attempt=2), 2)
    for step in (2, 3):
        old.save(snapshot(step))
        with pytest.raises(StaleAttempt, match="attempt 2"):
            old.wait()
    assert block.checkpoints.list() == ["step-00000001", "step-00000002"]
    manifest = block.checkpoints.read_text("step-00000002/MANIFEST").rpartition("}")[0] + "}"
    assert json.loads(manifest)["attempt"] == 2


@pytest.mark.parametrize(
    ("moment", "cleared"),
    [("optimizer", False), ("optimizer", True), ("MANIFEST", True), ("step-00000001", True)],
)
def test_an_attempt_overtaken_while_it_writes(tmp_path: Path, open_store: Opener, moment: str, cleared: bool) -> None:
    newer = BlockDirectory(Storage.open(tmp_path), 0)

    def hook(path: str) -> None:
        if moment in path.rpartition("/")[2] and newer.current_attempt() == 1:
            newer.claim(2)
            if cleared:  # the newer attempt also removes what it finds unfinished
                open_store(newer, attempt=2)

    block = BlockDirectory(HookedStorage(tmp_path, hook), 0)
    block.storage.write_atomic("attempt.json", b'{"attempt": 1}')
    store = open_store(block, attempt=1)
    store.save(snapshot(1))
    with pytest.raises(StaleAttempt):
        store.wait()
    assert newer.checkpoints.list() == []


def test_an_attempt_overtaken_while_it_puts(open_store: Opener) -> None:
    handler = HookedHandler(fsspec.filesystem("memory"))
    block = remote_block(handler)
    block.claim(1)
    store = open_store(block, attempt=1)
    save_all(store, 1)

    def hook(path: str) -> None:
        if "optimizer" in path:
            handler.hook = None
            block.claim(2)

    handler.hook = hook
    store.save(snapshot(2))
    with pytest.raises(StaleAttempt):
        store.wait()
    assert checkpoint_steps(block) == [1]
    assert not block.checkpoints.exists("step-00000002/MANIFEST")


@pytest.mark.parametrize("before", [True, False])
def test_a_leftover_is_committed_whole_or_not_at_all(tmp_path: Path, open_store: Opener, before: bool) -> None:
    save_all(open_store(BlockDirectory(Storage.open(tmp_path), 0)), 1)
    older = Storage.open(tmp_path).sub("checkpoints")
    leftover = ".tmp-step-00000002-0123"
    older.write_atomic(f"{leftover}/MANIFEST", b"x")
    seen: list[str] = []

    def hook(path: str) -> None:
        """The older writer goes on just before its folder is taken away, or just before its files go."""
        seen.append(path)
        if before and len(seen) == 1:
            older.commit_folder(leftover, "step-00000002")
        elif not before and len(seen) == 2:
            with pytest.raises(FileNotFoundError):
                older.commit_folder(leftover, "step-00000002")

    store = open_store(BlockDirectory(HookedStorage(tmp_path, hook), 0))
    assert len(seen) == 2
    assert store.steps() == ([1, 2] if before else [1])
    assert older.list() == ["step-00000001", "step-00000002"][: 1 + before]


@pytest.mark.parametrize("file", ["model", "state.json", "MANIFEST"])
def test_a_failed_put_leaves_the_last_checkpoint(open_store: Opener, file: str) -> None:
    handler = HookedHandler(fsspec.filesystem("memory"))
    block = remote_block(handler)
    store = open_store(block)
    save_all(store, 1)

    def hook(path: str) -> None:
        if file in path:
            handler.hook = None
            raise OSError("connection reset")

    handler.hook = hook
    store.save(snapshot(2))
    with pytest.raises(UserError, match="connection reset"):
        store.save(snapshot(3))
    assert_same(store.load_latest(), snapshot(1))
    save_all(store, 2)
    assert_same(store.load_latest(), snapshot(2))


class UnsureStorage(ArrowStorage):
    """Puts MANIFEST, and then loses the connection before it hears so."""

    def write_atomic(self, rel: str, data: bytes) -> None:
        super().write_atomic(rel, data)
        if rel.endswith("MANIFEST"):
            raise UserError("connection reset")

    def sub(self, rel: str) -> UnsureStorage:
        return UnsureStorage(self._filesystem, self._path(rel), self._uri_of(rel))


def test_a_put_that_arrived_after_all_is_a_checkpoint(open_store: Opener) -> None:
    filesystem, root = fs.FileSystem.from_uri("mock:///run")
    block = BlockDirectory(UnsureStorage(filesystem, root, "mock:///run"), 0)
    store = open_store(block)
    store.save(snapshot(1))
    with pytest.raises(UserError, match="connection reset"):
        store.wait()
    assert_same(store.load_latest(), snapshot(1))


def test_a_folder_that_is_a_file_is_named(block: BlockDirectory, open_store: Opener) -> None:
    store = open_store(block)
    block.storage.write_atomic("checkpoints", b"in the way")
    store.save(snapshot(1))
    with pytest.raises(UserError, match=r"cannot write .*checkpoints"):
        store.close()
    assert block.storage.list() == ["checkpoints"]


def test_a_full_disk_leaves_the_last_checkpoint(small_disk: Path, open_store: Opener) -> None:
    block = BlockDirectory(Storage.open(small_disk), 0)
    store = open_store(block)
    save_all(store, 1)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    store.save(snapshot(2))
    with pytest.raises(UserError, match=r"cannot write .*step-00000002.*No space left") as caught:
        store.wait()
    assert str(small_disk) in str(caught.value)
    assert block.checkpoints.list() == ["step-00000001"]
    assert_same(store.load_latest(), snapshot(1))
    (small_disk / "filler").unlink()
    save_all(store, 2)
    assert_same(store.load_latest(), snapshot(2))


def test_a_read_only_disk_leaves_the_last_checkpoint(small_disk: Path, open_store: Opener) -> None:
    block = BlockDirectory(Storage.open(small_disk), 0)
    store = open_store(block)
    save_all(store, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store.save(snapshot(2))
    with pytest.raises(UserError, match=r"Read-only file system") as caught:
        store.wait()
    assert str(small_disk) in str(caught.value)
    assert_same(store.load_latest(), snapshot(1))


_KILLED = """
import os, sys
from checkpoint_states import HookedStorage, snapshot
from pathlib import Path
from dbtrain.run_directory import BlockDirectory
from dbtrain.training.checkpoint import CheckpointStore

def train(attempt):
    def tell(path):
        os.write(1, b"w\\n")
    block = BlockDirectory(HookedStorage(Path(sys.argv[1]), tell), 0)
    block.claim(attempt)
    store = CheckpointStore(block, attempt, keep=2)
    step = store.load_latest().step
    while True:
        step += 1
        os.write(1, b"saving %d\\n" % step)
        store.save(snapshot(step, 20_000))
        store.wait()
        os.write(1, b"saved %d\\n" % step)

for attempt in sys.stdin:
    child = os.fork()
    if child == 0:
        train(int(attempt))
    os.write(1, b"pid %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def test_killed_at_any_moment(tmp_path: Path, open_store: Opener) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    block = BlockDirectory(Storage.open(tmp_path / "block"), 0)
    first = open_store(block, attempt=0)
    first.save(snapshot(1, 20_000))
    first.close()
    saved = 1
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path / "block")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=Path(__file__).parent,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for attempt in range(1, 16):
            parent.stdin.write(f"{attempt}\n")
            pid, begun, left = 0, False, chance.randrange(1, 25)
            for line in parent.stdout:
                word, _, number = line.strip().partition(" ")
                if word == "pid":
                    pid = int(number)
                elif word == "saved":
                    saved = int(number)
                elif word == "dead":
                    break
                begun |= word == "saving"
                left -= begun
                if pid and left <= 0:
                    os.kill(pid, signal.SIGKILL)
                    pid = 0
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                loaded = open_store(block, attempt=0).load_latest()
            assert loaded is not None
            assert saved <= loaded.step <= saved + 1, f"seed {seed}"
            assert_same(loaded, snapshot(loaded.step, 20_000))
            saved = loaded.step  # it may be durable without having been told, and the next attempt starts from it
        parent.stdin.close()
    assert saved > 5
    open_store(block, attempt=99)
    assert not [name for name in block.checkpoints.list() if name.startswith(".")]
