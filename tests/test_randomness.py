from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.randomness import derive_key, generator, keyed_normal, keyed_uniform, mix64, seeded, step_key

parts = st.lists(st.one_of(st.text(max_size=6), st.integers(-(2**80), 2**80)), max_size=4)


def test_keys_are_the_same_in_every_process_and_release() -> None:
    """A checkpoint resumed later, elsewhere, must draw the numbers that the run would have drawn."""
    assert derive_key(0) == 6101137009182222018
    assert derive_key(7, "order", 2, 31) == 5347395845798038394
    assert keyed_uniform(1, np.array([0, 5]), 2).tolist() == [
        [0.36818951565166946, 0.9435642308648544],
        [0.6263198237992851, 0.6066957387969014],
    ]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(seed=st.integers(0, 2**63 - 1), path=parts, other=parts)
def test_keys_tell_paths_apart(seed: int, path: list[str | int], other: list[str | int]) -> None:
    key = derive_key(seed, *path)
    assert 0 <= key < 2**63
    assert (key == derive_key(seed, *other)) == (path == other)
    assert key != derive_key(seed ^ 1, *path)


@pytest.mark.parametrize(
    ("path", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        (("a",), ("a", "")),
        ((1,), ("1",)),
        ((1,), ((1).to_bytes(16, "little").decode("latin-1"),)),
        ((1, 2), (2, 1)),
        ((0,), ()),
    ],
)
def test_lookalike_paths_differ(path: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
    assert derive_key(3, *path) != derive_key(3, *other)


def test_streams_blocks_steps_and_replicas_have_keys_of_their_own() -> None:
    keys = {
        step_key(seed, stream, block=block, step=step, replica=replica)
        for seed in range(2)
        for stream in ("noise", "dropout")
        for block in range(5)
        for step in range(50)
        for replica in range(3)
    }
    assert len(keys) == 2 * 2 * 5 * 50 * 3


def test_a_generator_is_a_function_of_its_key() -> None:
    draws = [torch.rand(4, generator=generator(derive_key(0, "x", step))) for step in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_mix64_is_a_bijection_whose_bits_avalanche() -> None:
    inputs = np.arange(100_000, dtype=np.uint64)
    outputs = mix64(inputs)
    assert len(np.unique(outputs)) == len(inputs)
    flipped = np.unpackbits((outputs ^ mix64(inputs ^ np.uint64(1))).view(np.uint8))
    assert flipped.mean() == pytest.approx(0.5, abs=0.002)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    key=st.integers(0, 2**63 - 1),
    positions=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
    lanes=st.integers(1, 9),
)
def test_a_number_depends_on_key_position_and_lane_alone(key: int, positions: list[int], lanes: int) -> None:
    together = keyed_uniform(key, np.array(positions), lanes)
    assert together.shape == (len(positions), lanes)
    assert ((together >= 0.0) & (together < 1.0)).all()
    for row, position in zip(together, positions, strict=True):
        alone = keyed_uniform(key, np.array([position]), lanes + 3)[0, :lanes]
        assert row.tolist() == alone.tolist()


@pytest.mark.parametrize("axis", ["positions", "lanes", "keys"])
def test_numbers_are_uniform_and_neighbours_uncorrelated(axis: str) -> None:
    n = 50_000
    if axis == "positions":
        u = keyed_uniform(derive_key(0, "u"), np.arange(n), 1)[:, 0]
    elif axis == "lanes":
        u = keyed_uniform(derive_key(0, "u"), np.array([12]), n)[0]
    else:
        u = np.array([keyed_uniform(key, np.array([12]), 1)[0, 0] for key in range(5_000)])
    n = len(u)
    steps = np.arange(n + 1) / n
    ordered = np.sort(u)
    distance = max(np.abs(ordered - steps[:-1]).max(), np.abs(steps[1:] - ordered).max())
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov, p = 0.001
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 3.5 / math.sqrt(n)


def test_no_position_repeats_another_positions_numbers() -> None:
    u = keyed_uniform(derive_key(1, "augment", 0), np.arange(20_000), 8)
    assert len(np.unique(u)) == u.size


def test_normal_numbers_are_the_quantiles_of_the_uniform_ones() -> None:
    key, positions = derive_key(3, "start"), np.arange(4_000)
    normal = keyed_normal(key, positions, 5)
    uniform = keyed_uniform(key, positions, 5)
    assert normal.dtype == torch.float32
    np.testing.assert_allclose(torch.special.ndtr(normal.double()).numpy(), uniform, atol=1e-6)
    assert torch.equal(keyed_normal(key, positions[7:9], 5), normal[7:9])
    assert bool(normal.isfinite().all())


def test_seeded_draws_what_manual_seed_does_and_leaves_no_trace() -> None:
    torch.manual_seed(12)
    expected = torch.rand(5)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with seeded(12, torch.device("cpu")):
        assert torch.equal(torch.rand(5), expected)
    assert torch.equal(torch.random.get_rng_state(), before)
