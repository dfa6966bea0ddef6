from __future__ import annotations

import pytest
import torch
from torch import nn

from dbtrain.config import EMAConfig
from dbtrain.training.ema import EMA


def _module(value: float) -> nn.Linear:
    module = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def _fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_half_life_is_counted_in_samples() -> None:
    for batch in (10, 50):  # whatever the batch
        module = _module(1.0)
        ema = EMA(module, EMAConfig(half_life=100, ramp_up=1.0))
        _fill(module, 0.0)
        for step in range(100 // batch):
            ema.update(samples=100_000 + step * batch, batch_size=batch)
        assert all(value.flatten().tolist() == pytest.approx([0.5] * value.numel()) for value in ema.tensors().values())


def test_ramp_up() -> None:
    """At 1000 samples a ramp-up of 0.05 lets the half-life be 50, however long it is later."""
    module = _module(1.0)
    ema = EMA(module, EMAConfig(half_life=10**9, ramp_up=0.05))
    _fill(module, 0.0)
    ema.update(samples=1000, batch_size=50)
    assert float(ema.tensors()["bias"][0]) == pytest.approx(0.5)
    without = EMA(_module(1.0), EMAConfig(half_life=100, ramp_up=0.0))
    without.update(samples=1000, batch_size=10)  # follows the weights at once
    assert float(without.tensors()["bias"][0]) == 1.0


def test_it_is_a_copy_that_can_be_put_back() -> None:
    module = _module(1.0)
    ema = EMA(module, EMAConfig(half_life=100))
    assert list(ema.tensors()) == ["weight", "bias"]
    _fill(module, 3.0)
    assert float(ema.tensors()["bias"][0]) == 1.0
    assert not any(value.requires_grad for value in ema.tensors().values())
    kept = {name: value.clone() for name, value in ema.tensors().items()}
    ema.update(100, 100)
    assert float(ema.tensors()["bias"][0]) > 1.0
    ema.restore(kept)
    assert all(torch.equal(value, kept[name]) for name, value in ema.tensors().items())
    _fill(module, 5.0)
    ema.update(10**6, 10**6)  # still follows the module's own parameters
    assert float(ema.tensors()["bias"][0]) == pytest.approx(5.0)
