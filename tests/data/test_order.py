from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.data.order import KeyedPermutation, SampleOrder
from dbtrain.randomness import derive_key

KEYS = st.integers(0, 2**63 - 1)


@given(n=st.integers(1, 5000), key=KEYS)
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    image = KeyedPermutation(n, key)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


@given(n=st.integers(1, 2**40), key=KEYS, data=st.data())
def test_permutation_of_any_size_stays_inside_and_apart(n: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True)))
    image = KeyedPermutation(n, key)(index)
    assert image.min() >= 0
    assert image.max() < n
    assert len(set(image.tolist())) == len(index)


@given(n=st.integers(1, 300), key=KEYS, data=st.data())
def test_a_single_row_is_found_without_the_others(n: int, key: int, data: st.DataObject) -> None:
    permutation = KeyedPermutation(n, key)
    index = data.draw(st.integers(0, n - 1))
    assert permutation(np.array([index]))[0] == permutation(np.arange(n))[index]


@given(rows=st.integers(1, 200), batch=st.integers(1, 77), seed=st.integers(0, 5), data=st.data())
def test_every_row_once_an_epoch_even_when_batches_straddle_epochs(
    rows: int, batch: int, seed: int, data: st.DataObject
) -> None:
    order = SampleOrder(rows, seed, block=1)
    steps = 3 * rows // batch + 1
    parts = [order.rows_at(step, batch) for step in range(steps)]
    positions = np.concatenate([part[0] for part in parts])
    sequence = np.concatenate([part[1] for part in parts])
    assert np.array_equal(positions, np.arange(steps * batch))
    for epoch in range(len(sequence) // rows):
        assert np.array_equal(np.sort(sequence[epoch * rows : (epoch + 1) * rows]), np.arange(rows))


@given(
    rows=st.integers(1, 100) | st.integers(4_000, 9_000),
    batch=st.integers(1, 40),
    replicas=st.integers(1, 5),
    step=st.integers(0, 10**6),
)
def test_replicas_share_the_global_batch(rows: int, batch: int, replicas: int, step: int) -> None:
    whole_positions, whole_rows = SampleOrder(rows, 7, block=0).rows_at(step, batch)
    for replica in range(replicas):
        positions, taken = SampleOrder(rows, 7, 0, replica, replicas).rows_at(step, batch)
        assert np.array_equal(positions, whole_positions[replica::replicas])
        assert np.array_equal(taken, whole_rows[replica::replicas])


@settings(max_examples=30)
@given(rows=st.integers(4_000, 9_000), batch=st.integers(1, 6_000), step=st.integers(0, 5))
def test_rows_are_those_of_the_permutation(rows: int, batch: int, step: int) -> None:
    positions, found = SampleOrder(rows, seed=3, block=2).rows_at(step, batch)
    for epoch in set((positions // rows).tolist()):
        inside = positions // rows == epoch
        whole = KeyedPermutation(rows, derive_key(3, "order", 2, epoch))
        assert np.array_equal(found[inside], whole(positions[inside] % rows))


def test_what_is_done_to_rows_is_done_to_nothing_else() -> None:
    order = SampleOrder(9_000, seed=1, block=0)
    first = order.rows_at(3, 64)[1]
    expected = first.copy()
    first[:] = 0
    assert np.array_equal(order.rows_at(3, 64)[1], expected)


def test_batch_size_does_not_change_the_sequence() -> None:
    order = SampleOrder(1000, 3, block=2)
    small = np.concatenate([order.rows_at(step, 10)[1] for step in range(250)])
    large = np.concatenate([order.rows_at(step, 125)[1] for step in range(20)])
    assert np.array_equal(small, large)


def test_blocks_epochs_and_seeds_differ() -> None:
    first = [
        SampleOrder(1000, seed, block).rows_at(step, 1000)[1].tolist()
        for seed in range(2)
        for block in range(2)
        for step in range(2)
    ]
    assert len({tuple(rows) for rows in first}) == len(first)


def test_the_order_is_the_same_everywhere() -> None:
    # Written down once: another value here means that no run made before can be resumed.
    assert SampleOrder(10, seed=0, block=0).rows_at(0, 10)[1].tolist() == [6, 9, 4, 3, 8, 5, 7, 1, 2, 0]


@pytest.mark.parametrize("n", [5, 16, 60])
def test_rows_are_uniform_over_epochs(n: int) -> None:
    """Chi-squared of where two places go; with 59 degrees of freedom 130 has a probability of about 1e-6."""
    epochs = 50 * n
    places = np.concatenate([KeyedPermutation(n, key)(np.array([0, n // 2])) for key in range(epochs)])
    for column in (places[::2], places[1::2]):
        counts = np.bincount(column, minlength=n)
        assert ((counts - 50) ** 2 / 50).sum() < 130


def test_bad_replica_is_refused() -> None:
    with pytest.raises(ValueError, match="replica 2"):
        SampleOrder(10, 0, 0, replica=2, replicas=2)
