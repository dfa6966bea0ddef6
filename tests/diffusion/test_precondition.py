from __future__ import annotations

import pytest
import torch

from dbtrain.diffusion.precondition import c_in, c_noise, c_out, c_skip, weights

SIGMA = torch.logspace(-2.7, 1.9, 40, dtype=torch.float64)
SIGMA_DATA = 0.5


def test_values_where_noise_equals_data() -> None:
    half = torch.tensor(0.5, dtype=torch.float64)
    assert float(c_skip(half, 0.5)) == pytest.approx(0.5)
    assert float(c_out(half, 0.5)) == pytest.approx(0.5 / 2**0.5)
    assert float(c_in(half, 0.5)) == pytest.approx(2**0.5)
    assert float(c_noise(half)) == pytest.approx(-0.1732868)
    assert float(weights("edm", half, 0.5)) == pytest.approx(8.0)


def test_the_perfect_network_gives_back_the_clean_target() -> None:
    y, eps = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = y + SIGMA * eps
    perfect = (y - c_skip(SIGMA, SIGMA_DATA) * z) / c_out(SIGMA, SIGMA_DATA)
    assert torch.allclose(c_skip(SIGMA, SIGMA_DATA) * z + c_out(SIGMA, SIGMA_DATA) * perfect, y, atol=1e-12)


def test_input_and_target_of_the_network_have_unit_variance() -> None:
    skip, out = c_skip(SIGMA, SIGMA_DATA), c_out(SIGMA, SIGMA_DATA)
    input_variance = c_in(SIGMA, SIGMA_DATA) ** 2 * (SIGMA**2 + SIGMA_DATA**2)
    target_variance = ((1 - skip) ** 2 * SIGMA_DATA**2 + skip**2 * SIGMA**2) / out**2
    assert torch.allclose(input_variance, torch.ones_like(SIGMA))
    assert torch.allclose(target_variance, torch.ones_like(SIGMA))


def test_edm_weight_undoes_the_output_scale() -> None:
    assert torch.allclose(weights("edm", SIGMA, SIGMA_DATA) * c_out(SIGMA, SIGMA_DATA) ** 2, torch.ones_like(SIGMA))


def test_unit_weight_is_one_per_sample() -> None:
    assert torch.equal(weights("unit", SIGMA, SIGMA_DATA), torch.ones_like(SIGMA))


def test_weights_are_per_sample_not_their_mean() -> None:
    loss = torch.tensor([1.0, 0.0], dtype=torch.float64)
    sigma = torch.tensor([80.0, 0.01], dtype=torch.float64)
    weighted = (weights("edm", sigma, SIGMA_DATA) * loss).mean()
    assert float(weighted) == pytest.approx(float(weights("edm", sigma[:1], SIGMA_DATA)) / 2)


def test_shape_and_type_are_kept() -> None:
    sigma = torch.rand(3, 1) + 0.1
    for value in (c_skip(sigma, 0.5), c_out(sigma, 0.5), c_in(sigma, 0.5), c_noise(sigma)):
        assert (value.shape, value.dtype) == (sigma.shape, torch.float32)
