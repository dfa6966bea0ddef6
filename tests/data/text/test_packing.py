from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.data.text import packing
from dbtrain.data.text.packing import Packer

DOCUMENTS = st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=20)


@pytest.mark.parametrize("batch", [1, 7, 1 << 18])
@given(documents=DOCUMENTS, length=st.integers(2, 30), parts=st.integers(1, 5))
def test_rows_and_tail_are_the_stream(batch: int, documents: list[list[int]], length: int, parts: int) -> None:
    """However documents come in parts and however often rows are handed out."""
    before, packing._BATCH_TOKENS = packing._BATCH_TOKENS, batch
    try:
        packer = Packer(length, 256, np.uint16)
        rows = list(packer.rows(np.array_split(np.array(ids, dtype=np.int64), parts) for ids in documents))
    finally:
        packing._BATCH_TOKENS = before
    stream = [token for ids in documents if ids for token in (*ids, 256)]
    found = np.concatenate([np.empty((0, length), dtype=np.uint16), *rows])
    assert found.dtype == np.uint16
    assert found.shape == (len(stream) // length, length)
    assert found.ravel().tolist() == stream[: found.size]
    assert packer.tokens == len(stream)
    assert packer.dropped == len(stream) - found.size
    assert packer.documents == sum(bool(ids) for ids in documents)


def test_memory_does_not_grow_with_the_text() -> None:
    def documents() -> Iterator[list[np.ndarray]]:
        for _ in range(2000):
            yield [np.zeros(10_000, dtype=np.int64)]

    packer = Packer(128, 256, np.uint16)
    tracemalloc.start()
    try:
        total = sum(len(rows) for rows in packer.rows(documents()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 2000 * 10_001 // 128
    assert peak < 4_000_000  # of 40 MB
