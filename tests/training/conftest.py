from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from checkpoint_states import Opener
from pyarrow import fs
from replica_groups import Replica, Start
from small_disks import small_disk as mounted_disk

from dbtrain.run_directory import BlockDirectory, RunDirectory
from dbtrain.storage import ArrowStorage, Storage
from dbtrain.training.checkpoint import CheckpointStore
from dbtrain.training.meeting import MeetingPlace
from dbtrain.training.seat import Seat


@pytest.fixture
def block(tmp_path: Path) -> BlockDirectory:
    return BlockDirectory(Storage.open(tmp_path / "blocks" / "00"), 0)


@pytest.fixture(params=["fsspec", "mock"])
def remote(request: pytest.FixtureRequest) -> BlockDirectory:
    if request.param == "mock":
        return BlockDirectory(Storage.open("mock:///run/blocks/00"), 0)
    filesystem = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    root = f"/{uuid.uuid4().hex}"
    return BlockDirectory(ArrowStorage(filesystem, root, f"memory://{root}"), 0)


@pytest.fixture
def open_store() -> Iterator[Opener]:
    """Opens stores, and ends their threads."""
    opened: list[CheckpointStore] = []

    def open_one(block: BlockDirectory, attempt: int = 1, keep: int = 2) -> CheckpointStore:
        opened.append(CheckpointStore(block, attempt, keep))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own, of 256 KiB."""
    with mounted_disk(tmp_path / "disk", "256k") as where:
        yield where


@pytest.fixture
def start_replicas() -> Iterator[Start]:
    """Starts the replicas of block 0, and ends what is left of them after the test."""
    started: list[Replica] = []
    meetings: list[MeetingPlace] = []

    def start(
        run: RunDirectory,
        attempt: int = 1,
        replicas: int = 2,
        *,
        until: int | None = None,
        stop_at: int = -1,
        poisoned: tuple[int, ...] = (),
    ) -> list[Replica]:
        """The last replica alone is asked to stop at its report of `stop_at`, and sees NaN in the steps `poisoned`."""
        first = len(started)
        # One a group: two runs of a test would find each other's attempts in the same store.
        meetings.append(MeetingPlace("127.0.0.1"))
        for number in range(replicas):
            seat = Seat(number, replicas, meetings[-1].address, until)
            started.append(Replica(run, attempt, seat, stop_at, poisoned))
        return started[first:]

    yield start
    for replica in started:
        replica.process.kill()
        replica.process.join()
