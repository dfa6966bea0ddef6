from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dbtrain.config import OptimiserConfig, RunConfig, ScheduleConfig
from dbtrain.errors import UserError
from dbtrain.models import family_of
from dbtrain.plan import NoiseRange
from dbtrain.training.optimisation import (
    gradient_norm,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)


def test_cosine_golden_values() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10, min_lr=0.1)
    found = [learning_rate(step, 110, 1.1, schedule) for step in (0, 4, 9, 10, 35, 60, 85, 109, 110)]
    expected = [0.11, 0.55, 1.1, 1.1, 0.953553, 0.6, 0.246447, 0.100247, 0.1]
    assert found == pytest.approx(expected, abs=1e-6)


def test_constant_and_degenerate_schedules() -> None:
    constant = ScheduleConfig(kind="constant", warmup_steps=4, min_lr=0.0)
    assert [learning_rate(step, 8, 2.0, constant) for step in (0, 1, 3, 4, 7)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert learning_rate(0, 5, 2.0, ScheduleConfig()) == 2.0
    all_warm = ScheduleConfig(warmup_steps=5)
    assert [learning_rate(step, 5, 1.0, all_warm) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate(5, 5, 1.0, all_warm) == 1.0


def test_only_matrices_of_linear_layers_decay(small_config: Callable[..., RunConfig]) -> None:
    config = small_config(optimiser={"weight_decay": 0.3, "betas": [0.8, 0.9], "eps": 1e-6})
    family = family_of(config)
    for module in (
        family.build_block(config, (0, 1), NoiseRange(low=0.1, high=1.0), family.codebook(config)),
        family.build_end_to_end(config),
    ):
        optimizer = make_optimizer(module, config.optimiser)
        names = {id(p): name for name, p in module.named_parameters()}
        decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay.keys() == set(names.values())
        assert {name for name, value in decay.items() if value == 0.3} == {
            name for name, p in module.named_parameters() if name.endswith("weight") and p.ndim == 2
        }
        assert decay["stem.positions"] == 0.0
        assert {(group["betas"], group["eps"], group["fused"]) for group in optimizer.param_groups} == {
            ((0.8, 0.9), 1e-6, True)
        }


def test_one_step_is_adamw() -> None:
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.fill_(2.0)
    optimizer = make_optimizer(module, OptimiserConfig(lr=0.1, weight_decay=0.5))
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    assert float(module.weight.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)
    assert float(module.bias.detach()) == pytest.approx(2.0 - 0.1, rel=1e-5)


def test_adafactor_passes_over_what_is_not_finite() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = make_optimizer(module, OptimiserConfig(kind="adafactor", lr=0.1))
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer_tensors(module, optimizer) == {}
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    assert {name.rpartition("/")[2] for name in optimizer_tensors(module, optimizer)} == {
        "step", "row_var", "col_var", "variance"
    }  # fmt: skip


def test_adafactor_is_not_cut_up(small_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match=r"'adafactor' needs whole matrices: .*resources\.shard"):
        small_config(optimiser={"kind": "adafactor"}, resources={"replicas": 2, "shard": True})


def test_state_goes_round_by_name() -> None:
    torch.manual_seed(0)
    data = torch.randn(5, 3)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(data).square().mean().backward()
        optimizer.step()

    modules = [nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)) for _ in range(2)]
    first, second = (make_optimizer(module, OptimiserConfig(lr=0.1)) for module in modules)
    assert optimizer_tensors(modules[0], first) == {}
    step(modules[0], first)
    kept = {name: value.clone() for name, value in optimizer_tensors(modules[0], first).items()}
    assert len(kept) == 3 * 6
    assert {name.rpartition("/")[2] for name in kept} == {"step", "exp_avg", "exp_avg_sq"}
    modules[1].load_state_dict(modules[0].state_dict())
    restore_optimizer(modules[1], second, kept, torch.device("cpu"))
    for module, optimizer in zip(modules, (first, second), strict=True):
        step(module, optimizer)
    for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_norm_of_gradients_is_pytorchs_to_the_last_bit() -> None:
    source = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=source) for shape in ((64, 33), (1,), (7,), (3, 5, 2))]
    assert torch.equal(gradient_norm(grads), torch.nn.utils.get_total_norm(grads))
    grads[1].fill_(float("nan"))
    assert gradient_norm(grads).isnan()
