from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.diffusion.codebook import digest, make_codebook

GOLDEN = "6031aacacb2477cb077e93cf521724b7846af8478096f291bae7519836766797"
GOLDEN_CIFAR = "19cd945a79a1807ac5842b89440b3e217580abfeaec57db0ec4b9fa1d72a2602"


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    num_classes=st.integers(1, 60),
    spare=st.integers(0, 30),
    scale=st.floats(0.1, 10.0),
    seed=st.integers(0, 2**63 - 1),
)
def test_rows_are_orthogonal_where_they_fit(num_classes: int, spare: int, scale: float, seed: int) -> None:
    rows = make_codebook(num_classes, num_classes + spare, scale, seed).double() / scale
    assert torch.allclose(rows @ rows.T, torch.eye(num_classes, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_size_of_cifar_100_is_orthonormal() -> None:
    rows = make_codebook(100, 128, 1.0, seed=0)
    assert (rows.shape, rows.dtype, rows.device.type) == ((100, 128), torch.float32, "cpu")
    assert float((rows.double() @ rows.double().T - torch.eye(100)).abs().max()) < 1e-6


def test_more_classes_than_dimensions_get_distinct_unit_rows() -> None:
    rows = make_codebook(300, 16, 2.0, seed=0).double()
    assert torch.allclose(rows.norm(dim=1), torch.full((300,), 2.0, dtype=torch.float64), atol=2e-6)
    cosine = (rows @ rows.T / 4.0).fill_diagonal_(0.0)
    assert float(cosine.max()) < 0.95
    assert abs(float(cosine.mean())) < 0.01


def test_the_bytes_are_the_same_on_every_machine() -> None:
    """A worker elsewhere must arrive at the digest that stands in the plan."""
    assert digest(make_codebook(3, 4, 1.0, seed=7)) == GOLDEN
    assert digest(make_codebook(100, 128, 1.0, seed=0)) == GOLDEN_CIFAR


def test_bytes_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = digest(make_codebook(50, 50, 1.0, seed=1))
        torch.set_num_threads(2)
        assert digest(make_codebook(50, 50, 1.0, seed=1)) == one
    finally:
        torch.set_num_threads(threads)


def test_another_seed_gives_another_table() -> None:
    assert len({digest(make_codebook(10, 16, 1.0, seed)) for seed in range(20)}) == 20


def test_values_lie_on_the_grid_before_scaling() -> None:
    rows = make_codebook(10, 16, 1.0, seed=0).double() * 2**24
    assert torch.equal(rows, rows.round())


@pytest.mark.parametrize(
    "other", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64), torch.zeros(6), torch.ones(3, 2)]
)
def test_digest_tells_values_shapes_and_types_apart(other: torch.Tensor) -> None:
    assert digest(torch.zeros(3, 2)) != digest(other)


def test_digest_reads_values_not_memory_layout() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    assert digest(rows.T.contiguous().T) == digest(rows)
