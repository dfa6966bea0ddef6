"""Steps on made-up samples: the trainer's in all that costs time, and none of its traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_families import MODELS

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.plan import Kind
from dbtrain.training import calibration
from dbtrain.training.calibration import Step, costliest, seconds_a_step
from dbtrain.training.planner import make_plan

FamilyConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "kind", "sections"),
    [
        *((family, "blocks", {}) for family in MODELS),
        ("recurrent_lm", "end_to_end", {}),
        ("vit", "blocks", {"blocks": {"relay_every": 10}}),
        ("dit", "blocks", {"training": {"accumulate": 4, "precision": "bfloat16"}, "resources": {"replicas": 2}}),
        ("masked_lm", "blocks", {"optimiser": {"kind": "adafactor", "clip_norm": None}, "ema": {"half_life": 0}}),
    ],
)
def test_a_step_trains(family_config: FamilyConfig, family: str, kind: Kind, sections: dict[str, Any]) -> None:
    config = family_config(family, **sections)
    plan = make_plan(config, kind)
    state = torch.get_rng_state()
    step = Step(config, plan, costliest(plan), CPU)
    before = [parameter.detach().clone() for parameter in step.module.parameters()]
    assert torch.equal(torch.get_rng_state(), state)
    step()
    assert any(not torch.equal(p, old) for p, old in zip(step.module.parameters(), before, strict=True))
    assert all(bool(parameter.isfinite().all()) for parameter in step.module.parameters())
    assert (step.ema is None) == (config.ema.half_life == 0)
    assert step.rows == config.training.batch_size // config.resources.replicas


def test_the_block_that_relays_furthest_is_timed(family_config: FamilyConfig) -> None:
    assert costliest(make_plan(family_config("vit", blocks={"relay_every": 10}))).index == 2
    assert costliest(make_plan(family_config("vit", model={"depth": 5}))).index == 0


def test_threads_are_the_runs_and_are_put_back(family_config: FamilyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Step, "__call__", lambda self: seen.append(torch.get_num_threads()))
    config = family_config("vit", resources={"threads": 3})
    before = torch.get_num_threads()
    seconds_a_step(config, make_plan(config))
    assert seen == [3] * (calibration.WARM_UP + calibration.STEPS)
    assert torch.get_num_threads() == before


def test_what_does_not_fit_is_said_with_what_helps(
    family_config: FamilyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Step) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "__call__", fails)
    config = family_config("vit")
    with pytest.raises(UserError, match=r"block 0 ran out of memory: .*training\.accumulate=2"):
        seconds_a_step(config, make_plan(config))
