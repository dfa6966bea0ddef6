"""What is a stem, and which runs can average it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_families import MODELS
from torch import nn

from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.errors import UserError
from dbtrain.models import family_of
from dbtrain.training.planner import build_on_meta, make_plan
from dbtrain.training.stem import check_backend_meets, check_same_stems, stem_of

SmallConfig = Callable[..., RunConfig]

STEMS = {
    "vit": {"stem", "reader", "head"},
    "dit": {"stem", "noise_embedding", "label_embedding", "norm", "head"},
    "causal_lm": {"embed_tokens", "norm", "lm_head", "code_stem", "noise_embedding", "norm_modulation"},
    "recurrent_lm": {"embed_tokens", "norm", "lm_head", "code_stem", "noise_embedding", "norm_modulation", "prelude"},
    "masked_lm": {"embedding", "level_embedding", "norm", "head"},
}


@pytest.mark.parametrize("family", MODELS)
def test_all_families_can_average(family_config: Callable[..., RunConfig], family: str) -> None:
    config = family_config(family, blocks={"stem": "averaged"})  # 4 layers in 3 blocks: of different size
    plan = make_plan(config)
    block, codebook = plan.blocks[0], family_of(config).codebook(config)
    module = build_on_meta(family_of(config), config, block.layers, block.trained, codebook)
    assert {name.partition(".")[0] for name in stem_of(module)} == STEMS[family]


def _block(width: int = 4, **parts: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, width), **parts})


def test_frozen_parameters_are_no_part_of_a_stem() -> None:
    block = _block()
    block.get_submodule("head").requires_grad_(False)
    assert stem_of(block) == {}


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (_block(width=5), r"head\.weight has the shape \(4, 4\) in block 0 and \(5, 4\) in block 1"),
        (_block(extra=nn.Linear(2, 2)), r"extra\.weight has the shape None in block 0 and \(2, 2\) in block 1"),
    ],
)
def test_stems_that_differ_are_refused(other: nn.Module, problem: str) -> None:
    check_same_stems([_block(), _block()])
    with pytest.raises(UserError, match=problem):
        check_same_stems([_block(), other])


@pytest.mark.parametrize("block", [nn.Linear(2, 2), nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})])
def test_a_module_without_layers_or_without_stem_is_refused(block: nn.Module) -> None:
    with pytest.raises(UserError, match=r"blocks.stem = 'averaged'.*inside and outside `layers`"):
        check_same_stems([block, block])


def test_blocks_that_train_one_after_the_other_cannot_average(small_config: SmallConfig) -> None:
    check_backend_meets(small_config(), "blocks")
    config = small_config(blocks={"stem": "averaged"})
    check_backend_meets(config, "end_to_end")
    with pytest.raises(UserError, match=r"blocks.stem = 'averaged'.*--backend ray"):
        check_backend_meets(config, "blocks")


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"blocks": {"count": 1, "stem": "averaged"}}, ["blocks.stem", "blocks.count 1", "'private'"]),
        (
            {"blocks": {"stem": "averaged"}, "resources": {"replicas": 2}},
            ["blocks.stem", "resources.replicas 2 to 1", "'private'"],
        ),
        (
            {"blocks": {"stem": "averaged", "average_every": 60}},
            ["blocks.average_every 60", "below training.steps 60", "no averaging follows"],
        ),
        (
            {"blocks": {"stem": "averaged"}, "resources": {"step_timeout": 100.0}},
            ["blocks.average_patience 60", "half of resources.step_timeout 100"],
        ),
    ],
)
def test_configurations_that_cannot_average(
    small_config: SmallConfig, sections: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        small_config(**sections)
    for part in parts:
        assert part in str(caught.value)


def test_private_stems_leave_the_identity_as_it_was(small_config: SmallConfig) -> None:
    private, averaged = small_config(), small_config(blocks={"stem": "averaged"})
    assert "stem" not in private.identity()["blocks"]
    patient = parse_config({**averaged.model_dump(), "blocks": {**averaged.blocks.model_dump(), "average_patience": 9}})
    rarer = parse_config({**averaged.model_dump(), "blocks": {**averaged.blocks.model_dump(), "average_every": 9}})
    assert averaged.digest() == patient.digest()
    assert len({private.digest(), averaged.digest(), rarer.digest()}) == 3
