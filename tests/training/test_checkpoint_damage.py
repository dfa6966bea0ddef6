from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_states import FILES, Opener, assert_same, save_all, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.errors import CorruptData, UserError
from dbtrain.run_directory import BlockDirectory
from dbtrain.storage import Storage
from dbtrain.training.checkpoint import CheckpointStore, checkpoint_steps, read_weights


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block with checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("pristine")
    store = CheckpointStore(BlockDirectory(Storage.open(root), 0), attempt=1, keep=2)
    save_all(store, 1, 2)
    store.close()
    return root


def assert_falls_back(root: Path) -> None:
    block = BlockDirectory(Storage.open(root), 0)
    store = CheckpointStore(block, attempt=1, keep=2)
    with pytest.warns(UserWarning, match="damaged checkpoint.*step-00000002"):
        assert_same(store.load_latest(), snapshot(1))
    assert store.steps() == [1]
    # Training passes step 2 again: the damaged one is replaced, and the fallback is still there.
    save_all(store, 2)
    assert store.steps() == checkpoint_steps(block) == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(store.load_latest(), snapshot(2))
    store.close()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_is_found(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("flipped") / "block"
    shutil.copytree(pristine, root)
    path = root / "checkpoints" / "step-00000002" / data.draw(st.sampled_from(FILES))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert_falls_back(root)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_other_damage_is_found(pristine: Path, tmp_path: Path, name: str, damage: str) -> None:
    root = tmp_path / "block"
    shutil.copytree(pristine, root)
    path = root / "checkpoints" / "step-00000002" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        changed = {"truncated": content[: len(content) // 2], "empty": b"", "longer": content + b"\0"}
        path.write_bytes(changed[damage])
    assert_falls_back(root)


def test_a_file_in_the_place_of_a_checkpoint(pristine: Path, tmp_path: Path) -> None:
    root = tmp_path / "block"
    shutil.copytree(pristine, root)
    folder = root / "checkpoints" / "step-00000002"
    shutil.rmtree(folder)
    folder.write_bytes(b"not a folder")
    assert_falls_back(root)


def test_damaged_file_on_an_object_store(remote: BlockDirectory, open_store: Opener) -> None:
    save_all(open_store(remote), 1, 2)
    [name] = [name for name in remote.checkpoints.list("step-00000002") if "ema" in name]
    remote.checkpoints.write_atomic(f"step-00000002/{name}", b"other")
    store = open_store(remote)
    with pytest.warns(UserWarning, match="damaged"):
        assert_same(store.load_latest(), snapshot(1))
    save_all(store, 2)
    assert_same(store.load_latest(), snapshot(2))


def test_all_damaged_is_an_error(block: BlockDirectory, open_store: Opener) -> None:
    save_all(open_store(block), 1, 2)
    for step in (1, 2):
        block.checkpoints.remove_tree(f"step-0000000{step}/model.safetensors")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CorruptData, match="all checkpoints"):
        open_store(block).load_latest()


def test_damaged_checkpoints_do_not_count_as_kept(block: BlockDirectory, open_store: Opener) -> None:
    save_all(open_store(block, keep=3), 1, 2, 3)
    block.checkpoints.remove_tree("step-00000003/state.json")
    store = open_store(block, keep=2)
    with pytest.warns(UserWarning, match="damaged"):
        store.load_latest()
    save_all(store, 4)
    assert checkpoint_steps(block) == [2, 4]


def test_a_checkpoint_under_another_step_is_damage(block: BlockDirectory, open_store: Opener) -> None:
    save_all(open_store(block), 1)
    folder = block.checkpoints.local_path
    assert folder is not None
    shutil.copytree(folder / "step-00000001", folder / "step-00000009")
    with pytest.warns(UserWarning, match="belongs to step 1"):
        assert_same(open_store(block).load_latest(), snapshot(1))


def test_weights_for_assembly_have_no_fallback(block: BlockDirectory, open_store: Opener) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        read_weights(block, "raw")
    save_all(open_store(block), 1, 2)
    for which, expected in (("raw", snapshot(2).model), ("ema", snapshot(2).ema)):
        step, found = read_weights(block, which)  # type: ignore[arg-type]
        assert step == 2
        assert expected is not None
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    block.checkpoints.remove_tree("step-00000002/optimizer.safetensors.zst")
    read_weights(block, "raw")
    block.checkpoints.write_atomic("step-00000002/model.safetensors", b"tampered")
    read_weights(block, "ema")
    with pytest.raises(CorruptData, match=r"step-00000002/model\.safetensors"):
        read_weights(block, "raw")
