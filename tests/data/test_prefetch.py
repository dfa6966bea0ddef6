from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from test_loader import loader

from dbtrain.data.loader import BatchLoader
from dbtrain.data.prefetch import PrefetchingLoader
from dbtrain.errors import CorruptData


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Steps whose batches were made, and whether the main thread made them."""
    steps: list[tuple[int, bool]] = []
    batch = BatchLoader.batch

    def noting(self: BatchLoader, step: int) -> dict[str, torch.Tensor]:
        steps.append((step, threading.current_thread() is threading.main_thread()))
        if step == 13:
            raise CorruptData("a bad shard")
        return batch(self, step)

    monkeypatch.setattr(BatchLoader, "batch", noting)
    return steps


def test_what_was_begun_with_is_taken_and_nothing_else(shards: Path, made: list[tuple[int, bool]]) -> None:
    plain = loader(shards, 16)
    with closing(PrefetchingLoader(loader(shards, 16))) as ahead:
        found = [ahead.batch(0)]
        for begun, asked in ((1, 1), (2, 7), (3, 3)):  # at 2 training goes back to a checkpoint
            ahead.prefetch(begun)
            found.append(ahead.batch(asked))
        found.append(ahead.batch(3))  # asked for again
    assert sorted(made) == [(0, True), (1, False), (2, False), (3, False), (3, True), (7, True)]
    for step, batch in zip((0, 1, 7, 3, 3), found, strict=True):
        assert all(torch.equal(batch[name], value) for name, value in plain.batch(step).items())


def test_what_goes_wrong_is_told_at_its_step(shards: Path, made: list[tuple[int, bool]]) -> None:
    ahead = PrefetchingLoader(loader(shards, 16))
    ahead.prefetch(13)
    assert ahead.batch(5)["label"].shape == (16,)
    ahead.prefetch(13)
    with pytest.raises(CorruptData, match="a bad shard"):
        ahead.batch(13)
    ahead.prefetch(13)
    ahead.close()
    ahead.close()
