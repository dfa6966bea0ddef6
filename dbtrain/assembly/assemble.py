"""Stitching the trained blocks of a run into one model folder.

    run/model/config.json        configuration, plan, which weights, what the images have to look like
    run/model/model.safetensors  blocks.<index>.<parameter>, and the codebook
    run/model/tokenizer.json     for models of text
    run/model/README.md          what it is and where it came from

Everything a block was trained against is checked here, because nothing checked it during training: blocks never met.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from dbtrain.assembly.card import run_card
from dbtrain.config import RunConfig
from dbtrain.errors import CorruptData, UserError
from dbtrain.models import family_of
from dbtrain.plan import Plan
from dbtrain.run_directory import TOKENIZER, BlockDirectory, RunDirectory
from dbtrain.storage import temporary_name
from dbtrain.training.checkpoint import checkpoint_steps, read_state, read_weights
from dbtrain.training.planner import build_on_meta, check_plan, origin

Weights = Literal["ema", "raw"]
FORMAT = 1
"""Version of the model folder's layout."""


@dataclass(frozen=True)
class Assembled:
    """What `assemble` made."""

    path: str
    """The model folder, a path or URI."""
    sha256: str
    """Digest of model.safetensors: equal digests mean equal weights."""
    weights: Weights
    blocks: int
    parameters: int
    bytes: int
    steps: tuple[int, ...]
    """Steps of each block."""
    partial: bool
    """Some block is not trained to its end."""


def assemble(run: RunDirectory, weights: Weights | None = None, partial: bool = False) -> Assembled:
    """Check and join the newest checkpoints of all blocks, and write the model folder in one piece.

    Args:
        weights: averaged (`ema`) or last (`raw`) parameters; averaged ones by default if the run kept them.
        partial: take blocks that are not trained to their end as far as they are, also while they train.

    Raises:
        UserError: a block is unfinished, or has nothing yet where `partial` is asked for; or averaged weights are asked
            of a run that has none.
        CorruptData: a checkpoint is damaged or comes from another block or run, or configuration, plan and codebook do
            not belong together.
    """
    config, plan = run.config, run.plan
    chosen = _choose(config, weights)
    family = family_of(config)
    codebook = family.codebook(config) if plan.kind == "blocks" else None
    check_plan(config, plan, codebook)
    tensors: dict[str, Tensor] = {} if codebook is None else {"codebook": codebook}
    steps = []
    for block in plan.blocks:
        step, found, state = _read_block(run.block(block.index), chosen)
        if step != plan.steps and not partial:
            raise UserError(
                f"block {block.index} has reached step {step} of {plan.steps}",
                field="run",
                value=run.uri,
                mend="finish it with `dbtrain train` or `dbtrain baseline` on that directory, or take it as --partial",
            )
        steps.append(step)
        expected = build_on_meta(family, config, block.layers, block.trained, codebook)
        shapes = {name: value.shape for name, value in expected.named_parameters()}
        if (
            state["origin"] != origin(plan, block.index)
            or {name: value.shape for name, value in found.items()} != shapes
        ):
            raise CorruptData(
                f"the checkpoint of block {block.index} comes from another block or run",
                field="run",
                value=run.uri,
                mend="put back the block's own checkpoints, or train it again",
            )
        tensors |= {f"blocks.{block.index}.{name}": value.contiguous() for name, value in found.items()}
    return _write(run, tensors, chosen, tuple(steps))


def _read_block(block: BlockDirectory, weights: Weights) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Step, parameters and state of a block's newest checkpoint, which its worker may replace meanwhile."""
    while True:
        newest = checkpoint_steps(block)[-1:]
        try:
            step, found = read_weights(block, weights)
            state = read_state(block)
        except CorruptData:
            if checkpoint_steps(block)[-1:] == newest:
                raise
            continue
        if checkpoint_steps(block)[-1:] == newest:
            return step, found, state


def _choose(config: RunConfig, weights: Weights | None) -> Weights:
    averaged = config.ema.half_life > 0
    if weights == "ema" and not averaged:
        raise UserError(
            "the run kept no averaged weights",
            field="--weights",
            value="ema",
            mend="use --weights raw, or train with ema.half_life above 0",
        )
    return weights or ("ema" if averaged else "raw")


def describe_model(
    config: RunConfig, plan: Plan, weights: Weights, steps: tuple[int, ...], sha256: str
) -> dict[str, Any]:
    """The content of a model folder's config.json."""
    return {
        "format": FORMAT,
        "weights": weights,
        "steps": steps,
        "sha256": sha256,
        "config": config.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
    }


def _write(run: RunDirectory, tensors: dict[str, Tensor], weights: Weights, steps: tuple[int, ...]) -> Assembled:
    config, plan = run.config, run.plan
    data = safetensors.torch.save(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    parameters = sum(block.parameters for block in plan.blocks)
    about = describe_model(config, plan, weights, steps, sha256)
    folder, storage = temporary_name("model"), run.storage
    try:
        storage.write_atomic(f"{folder}/model.safetensors", data)
        storage.write_atomic(f"{folder}/README.md", run_card(config, plan, weights, steps, sha256).encode())
        if storage.exists(TOKENIZER):
            storage.write_atomic(f"{folder}/{TOKENIZER}", storage.read_bytes(TOKENIZER))
        storage.write_atomic(f"{folder}/config.json", json.dumps(about, indent=2).encode())
        storage.commit_folder(folder, "model")
    except BaseException:
        with contextlib.suppress(UserError):
            storage.remove_tree(folder)
        raise
    return Assembled(
        path=storage.sub("model").uri,
        sha256=sha256,
        weights=weights,
        blocks=len(plan.blocks),
        parameters=parameters,
        bytes=len(data),
        steps=steps,
        partial=min(steps) < plan.steps,
    )
