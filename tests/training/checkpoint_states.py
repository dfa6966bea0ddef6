"""What the tests of checkpoints save, and a storage that lets them act in the middle of saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dbtrain.storage import LocalStorage
from dbtrain.training.checkpoint import CheckpointStore, Snapshot

Opener = Callable[..., CheckpointStore]
"""open_store(block, attempt=1, keep=2)"""
FILES = ["MANIFEST", "ema.safetensors", "model.safetensors", "optimizer.safetensors.zst", "state.json"]


def snapshot(step: int, size: int = 300) -> Snapshot:
    """A state of every type and shape that occurs, all of whose numbers depend on the step."""
    generator = torch.Generator().manual_seed(step)
    model = {
        "weight": torch.randn(size, 3, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(float(step)),
        "empty": torch.zeros(0, 4),
    }
    ema = {name: 3 * value for name, value in model.items()}
    moment = torch.randn(size, 3, generator=generator).bfloat16().float()  # half of its bytes are zeros
    optimizer = {"step": torch.tensor(step), "moment.weight": moment}
    return Snapshot(step, model, ema, optimizer, {"samples": 4 * step, "skipped": 0})


def assert_same(loaded: Snapshot | None, saved: Snapshot) -> None:
    assert loaded is not None
    assert (loaded.step, loaded.state) == (saved.step, saved.state)
    for ours, theirs in (
        (loaded.model, saved.model),
        (loaded.ema, saved.ema),
        (loaded.optimizer, saved.optimizer),
    ):
        if theirs is None:
            assert ours is None
            continue
        assert ours is not None
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor)


def save_all(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(snapshot(step))
    store.wait()


class HookedStorage(LocalStorage):
    """Calls a function with each path before it is written, committed or removed."""

    def __init__(self, root: Path, hook: Callable[[str], None], prefix: str = ""):
        super().__init__(root)
        self._hook, self._prefix = hook, prefix

    def write_atomic(self, rel: str, data: bytes) -> None:
        self._hook(self._prefix + rel)
        super().write_atomic(rel, data)

    def commit_folder(self, tmp_rel: str, final_rel: str) -> None:
        self._hook(self._prefix + final_rel)
        super().commit_folder(tmp_rel, final_rel)

    def remove_tree(self, rel: str) -> None:
        self._hook(self._prefix + rel)
        super().remove_tree(rel)

    def sub(self, rel: str) -> HookedStorage:
        return HookedStorage(self._root / rel, self._hook, f"{self._prefix}{rel}/")
