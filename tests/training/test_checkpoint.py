from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_states import FILES, HookedStorage, Opener, assert_same, save_all, snapshot

from dbtrain.errors import UserError
from dbtrain.run_directory import BlockDirectory
from dbtrain.storage import Storage
from dbtrain.training.checkpoint import CheckpointStore, Snapshot, checkpoint_steps, read_weights


def test_round_trip_and_layout(block: BlockDirectory, open_store: Opener) -> None:
    store = open_store(block)
    assert store.load_latest() is None
    save_all(store, 1, 2)
    assert block.checkpoints.list() == ["step-00000001", "step-00000002"]
    assert block.checkpoints.list("step-00000002") == FILES
    assert_same(open_store(block).load_latest(), snapshot(2))
    assert store.steps() == checkpoint_steps(block) == [1, 2]


def test_round_trip_on_an_object_store(remote: BlockDirectory, open_store: Opener) -> None:
    store = open_store(remote)
    assert store.load_latest() is None
    save_all(store, 1, 2, 3)
    assert store.steps() == [2, 3]
    assert_same(open_store(remote).load_latest(), snapshot(3))
    save_all(store, 3)
    assert len(remote.checkpoints.list("step-00000003")) == len(FILES)
    assert read_weights(remote, "raw")[0] == 3


def test_without_average_and_with_nothing_to_optimise(block: BlockDirectory, open_store: Opener) -> None:
    bare = Snapshot(7, {"w": torch.ones(2)}, None, {}, {})
    store = open_store(block)
    store.save(bare)
    store.wait()
    assert_same(store.load_latest(), bare)
    assert read_weights(block, "raw")[1].keys() == {"w"}
    with pytest.raises(UserError, match="no averaged weights"):
        read_weights(block, "ema")


def test_loaded_tensors_may_be_written_to(block: BlockDirectory, open_store: Opener) -> None:
    store = open_store(block)
    save_all(store, 1)
    loaded = store.load_latest()
    assert loaded is not None
    loaded.model["weight"].zero_()
    assert_same(store.load_latest(), snapshot(1))


def test_bytes_depend_on_values_alone(tmp_path: Path, open_store: Opener) -> None:
    table = torch.arange(24.0).reshape(4, 6)
    views = {"t": table.t(), "column": table[:, 1], "again": table, "row": table[2]}
    copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in views.items()}
    found = []
    for number, tensors in enumerate((views, dict(reversed(copies.items())))):
        block = BlockDirectory(Storage.open(tmp_path / str(number)), 0)
        store = open_store(block)
        store.save(Snapshot(1, tensors, tensors, tensors, {"b": 1, "a": 2} if number else {"a": 2, "b": 1}))
        store.wait()
        loaded = store.load_latest()
        assert loaded is not None
        assert all(torch.equal(loaded.model[name], value) for name, value in views.items())
        names = block.checkpoints.list("step-00000001")
        found.append({name: block.checkpoints.read_bytes(f"step-00000001/{name}") for name in names})
    assert found[0] == found[1]


def test_only_what_compresses_is_compressed(block: BlockDirectory, open_store: Opener) -> None:
    noise = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    state = Snapshot(1, {"w": noise}, None, {"m": torch.zeros(1 << 19)}, {})
    store = open_store(block)
    store.save(state)
    store.wait()
    assert set(block.checkpoints.list("step-00000001")) == {
        "MANIFEST",
        "model.safetensors",
        "optimizer.safetensors.zst",
        "state.json",
    }
    assert_same(store.load_latest(), state)


def test_saving_returns_before_the_files_are_written(tmp_path: Path, open_store: Opener) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def hook(path: str) -> None:
        if path.endswith("state.json"):
            writing.set()
            assert go_on.wait(60)

    block = BlockDirectory(HookedStorage(tmp_path, hook), 0)
    store = open_store(block)
    store.save(snapshot(1))
    assert writing.wait(60)
    assert store.steps() == []
    assert all(name.startswith(".tmp-") for name in block.checkpoints.list())
    go_on.set()
    store.wait()
    assert store.steps() == [1]


def test_newest_are_kept(block: BlockDirectory, open_store: Opener) -> None:
    save_all(open_store(block, keep=3), 1, 2, 3, 4, 5)
    assert checkpoint_steps(block) == [3, 4, 5]
    save_all(open_store(block, keep=1), 6)
    assert checkpoint_steps(block) == [6]


def test_closing_is_repeatable(block: BlockDirectory) -> None:
    store = CheckpointStore(block, attempt=1, keep=1)
    store.save(snapshot(1))
    store.close()
    store.close()
    assert checkpoint_steps(block) == [1]


def test_leftovers_of_dead_writers_go(block: BlockDirectory, open_store: Opener) -> None:
    save_all(open_store(block), 1, 2)
    folder = block.checkpoints.local_path
    assert folder is not None
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000003-0123")
    (folder / "step-00000002").rename(folder / ".tmp-old-step-00000002")  # died while replacing
    block.claim(2)
    open_store(block, attempt=1)  # a stale writer touches nothing
    assert ".tmp-step-00000003-0123" in block.checkpoints.list()
    store = open_store(block, attempt=2)
    assert block.checkpoints.list() == ["step-00000001", "step-00000002"]
    assert_same(store.load_latest(), snapshot(2))
    shutil.copytree(folder / "step-00000001", folder / ".tmp-old-step-00000002")  # died after replacing
    assert_same(open_store(block, attempt=2).load_latest(), snapshot(2))
    assert block.checkpoints.list() == ["step-00000001", "step-00000002"]


def test_uncommitted_folders_on_an_object_store_do_not_count(remote: BlockDirectory, open_store: Opener) -> None:
    save_all(open_store(remote), 1)
    remote.checkpoints.write_atomic("step-00000002/aaaa.model.safetensors", b"x")
    assert checkpoint_steps(remote) == [1]
    assert_same(open_store(remote).load_latest(), snapshot(1))
    assert remote.checkpoints.list() == ["step-00000001"]
