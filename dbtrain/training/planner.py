"""RunConfig -> Plan: layers, noise ranges, and what each block costs; whether a plan still is that of a RunConfig."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.diffusion.codebook import digest
from dbtrain.errors import CorruptData
from dbtrain.models import Family, Piece, TrainableModule, family_of
from dbtrain.models.family import relays
from dbtrain.plan import BlockPlan, DatasetFacts, Kind, NoiseRange, Plan
from dbtrain.training.cost import Cost, cost_of
from dbtrain.training.stem import averages_stems, check_same_stems


def make_plan(config: RunConfig, kind: Kind = "blocks", data: DatasetFacts | None = None) -> Plan:
    """The plan of `config`: block-wise, or of its end-to-end baseline (one block that owns every layer).

    Raises:
        UserError: the family cannot cut or start it so, or its blocks have no stems that could be averaged.
    """
    family = family_of(config)
    family.check_start(config)
    codebook = family.codebook(config) if kind == "blocks" else None
    pieces = _cut(config, kind)

    def build(piece: Piece) -> TrainableModule:
        return build_on_meta(family, config, piece.layers, piece.trained, codebook)

    if averages_stems(config, kind):
        check_same_stems([build(piece) for piece in pieces])
    blocks = []
    costs: dict[tuple[tuple[int, int], ...], Cost] = {}  # the noise range changes no size
    for index, piece in enumerate(pieces):
        before = pieces[:index] if relays(config, kind) else []
        size = piece.layers[1] - piece.layers[0]
        same = (*(earlier.layers for earlier in before), (0, size))
        if same not in costs:
            costs[same] = cost_of(family, config, piece, before, build)
        cost = costs[same]
        blocks.append(
            BlockPlan(
                index=index,
                layers=piece.layers,
                noise=piece.noise,
                trained=piece.trained,
                parameters=cost.parameters,
                bytes=cost.bytes,
                evaluations=piece.evaluations,
                flops_per_sample=cost.flops_per_sample,
            )
        )
    return Plan(
        kind=kind,
        name=config.name,
        config_sha256=config.digest(),
        codebook_sha256=None if codebook is None else digest(codebook),
        seed=config.seed,
        steps=_steps(config, kind),
        batch_size=config.training.batch_size,
        threads=config.resources.threads,
        data=data,
        blocks=tuple(blocks),
    )


def check_plan(config: RunConfig, plan: Plan, codebook: Tensor | None) -> None:
    """Whether `plan` still is the plan of `config`, and `codebook` the one that it was made with.

    Raises:
        CorruptData: one of them was changed after the run had started, or a library made another codebook here.
    """
    if config.digest() != plan.config_sha256:
        raise CorruptData(
            "config.yaml and plan.json of the run belong to different configurations",
            mend="put back the one that was changed; a run of another version of dbtrain, whose configuration has other"
            " fields, is for that version",
        )
    cut = _cut(config, plan.kind)
    if (
        (plan.seed, plan.steps, plan.batch_size) != (config.seed, _steps(config, plan.kind), config.training.batch_size)
        or plan.threads != config.resources.threads
        or [block.index for block in plan.blocks] != list(range(len(cut)))
        or not all(_same_piece(block, piece) for block, piece in zip(plan.blocks, cut, strict=True))
    ):
        raise CorruptData("plan.json of the run is not the plan that its config.yaml gives")
    if codebook is not None and digest(codebook) != plan.codebook_sha256:
        raise CorruptData(
            "the codebook made here is not the one the plan was made with",
            field="codebook_sha256",
            value=plan.codebook_sha256,
            mend="use the versions of dbtrain, PyTorch and numpy, and the pretrained model if any, that the run was"
            " started with",
        )


def origin(plan: Plan, index: int) -> dict[str, Any]:
    """What a block's checkpoints say of where they come from: blocks are copied between machines, and look alike."""
    return {
        "kind": plan.kind,
        "block": index,
        "config_sha256": plan.config_sha256,
        "codebook_sha256": plan.codebook_sha256,
        "data_sha256": None if plan.data is None else plan.data.sha256,
    }


def _cut(config: RunConfig, kind: Kind) -> list[Piece]:
    family = family_of(config)
    return [family.whole(config)] if kind == "end_to_end" else family.cut(config)


def _steps(config: RunConfig, kind: Kind) -> int:
    """Optimiser steps: the configured ones for blocks, as many layer-evaluations for the end-to-end network."""
    if kind == "blocks":
        return config.training.steps
    family = family_of(config)
    blocks = sum(piece.evaluations for piece in family.cut(config))
    return max(1, round(config.training.steps * blocks / family.whole(config).evaluations))


def _same_piece(block: BlockPlan, piece: Piece) -> bool:
    return (
        block.layers == piece.layers
        and _same_range(block.noise, piece.noise)
        and _same_range(block.trained, piece.trained)
    )


def _same_range(a: NoiseRange | None, b: NoiseRange | None) -> bool:
    if a is None or b is None:
        return a is b
    # Machines may round logarithms differently in the last place.
    return math.isclose(a.low, b.low, rel_tol=1e-9) and math.isclose(a.high, b.high, rel_tol=1e-9)


def build_on_meta(
    family: Family,
    config: RunConfig,
    layers: tuple[int, int],
    trained: NoiseRange | None,
    codebook: Tensor | None,
) -> TrainableModule:
    """`build_module` without a byte allocated: its tensors have shapes alone."""
    with torch.device("meta"):
        return build_module(family, config, layers, trained, None if codebook is None else codebook.to("meta"))


def build_module(
    family: Family,
    config: RunConfig,
    layers: tuple[int, int],
    trained: NoiseRange | None,
    codebook: Tensor | None,
) -> TrainableModule:
    """The block's module, or the end-to-end network where the block has no noise range."""
    if trained is None:
        module = family.build_end_to_end(config)
    else:
        module = family.build_block(config, layers, trained, codebook)
    module.recompute = config.training.recompute
    return module
