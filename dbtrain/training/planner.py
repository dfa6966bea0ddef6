"""RunConfig -> Plan: layers, noise ranges, and the exact bytes and FLOPs of each block, allocating nothing.

Each block is built on PyTorch's `meta` device, where tensors have shapes and no storage, and one training step is
traced there: parameters and buffers are counted from the module, FLOPs by PyTorch's counter. Which tensors autograd
saves depends on the kernels and on autocast, so activations are counted on fake tensors that dispatch as a CPU's do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbtrain.config import RunConfig
from dbtrain.diffusion.codebook import digest
from dbtrain.errors import CorruptData
from dbtrain.models import Family, Piece, TrainableModule, family_of
from dbtrain.models.family import relays, walk_to
from dbtrain.models.layers import layers_of
from dbtrain.plan import BlockPlan, Bytes, DatasetFacts, Kind, NoiseRange, Plan
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
    if averages_stems(config, kind):
        check_same_stems([build_on_meta(family, config, p.layers, p.trained, codebook) for p in pieces])
    blocks = []
    measured: dict[tuple[tuple[int, int], ...], tuple[int, Bytes, int]] = {}  # the noise range changes no size
    for index, piece in enumerate(pieces):
        before = pieces[:index] if relays(config, kind) else []
        size = piece.layers[1] - piece.layers[0]
        same = (*(earlier.layers for earlier in before), (0, size))
        if same not in measured:
            measured[same] = _measure(family, config, piece, before, codebook)
        parameters, resident, flops = measured[same]
        blocks.append(
            BlockPlan(
                index=index,
                layers=piece.layers,
                noise=piece.noise,
                trained=piece.trained,
                parameters=parameters,
                bytes=resident,
                evaluations=piece.evaluations,
                flops_per_sample=flops,
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
        raise CorruptData("config.yaml and plan.json of the run belong to different configurations")
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


def _measure(
    family: Family, config: RunConfig, piece: Piece, before: Sequence[Piece], codebook: Tensor | None
) -> tuple[int, Bytes, int]:
    """Parameters of a piece, its bytes at the configured micro-batch, and FLOPs a sample.

    Where blocks relay, `before` are the pieces whose weights it holds, too, to compute their features.
    """
    module = build_on_meta(family, config, piece.layers, piece.trained, codebook)
    others = [build_on_meta(family, config, other.layers, other.trained, codebook) for other in before]
    resources = config.resources
    micro_batch = config.training.batch_size // config.training.accumulate // resources.replicas
    parameters = list(module.parameters())
    frozen = [*module.buffers(), *(t for other in others for t in (*other.parameters(), *other.buffers()))]
    buffers = sum(tensor.numel() * tensor.element_size() for tensor in frozen)
    # DDP keeps all on every replica, and its buckets are the gradients themselves.
    ways = resources.replicas if resources.shard else 1
    weights = sum(_part_bytes(p, ways) for p in parameters)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        _loss(family, config, module, others, micro_batch).backward()  # type: ignore[no-untyped-call]
    return (
        sum(p.numel() for p in parameters),
        Bytes(
            parameters=weights,
            buffers=buffers,
            gradients=weights,
            # AdamW: two moments a weight, and one float32 step counter a tensor.
            optimiser=2 * weights + 4 * len(parameters),
            ema=weights if config.ema.half_life > 0 else 0,
            activations=_activation_bytes(family, config, piece, others, codebook, micro_batch),
            gathered=_gathered_bytes(module) if resources.shard else 0,
        ),
        int(counter.get_total_flops()) // micro_batch,
    )


def _part_bytes(parameter: Tensor, ways: int) -> int:
    """Bytes of the largest part when FSDP2 cuts a parameter along its first dimension."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return math.ceil(rows / ways) * (parameter.numel() // max(rows, 1)) * parameter.element_size()


def _gathered_bytes(module: TrainableModule) -> int:
    """Most bytes of whole tensors that a replica holds beside its own parts, by FSDP2's scheme.

    All that belongs to no layer, for the whole step; the layer in hand and the next one, fetched ahead; and the
    gradients of one of these groups twice, as they were computed and as they are sent.
    """
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers_of(module)]
    rest = sum(p.numel() * p.element_size() for p in module.parameters()) - sum(layers)
    ahead = sorted(layers)[-2:]
    return rest + sum(ahead) + 2 * max(rest, *ahead, 0)


def _activation_bytes(
    family: Family,
    config: RunConfig,
    piece: Piece,
    others: Sequence[TrainableModule],
    codebook: Tensor | None,
    micro_batch: int,
) -> int:
    """Most bytes that autograd holds at once for the way back."""
    module = build_on_meta(family, config, piece.layers, piece.trained, codebook)
    saved = _saved_bytes(family, config, module, others, micro_batch)
    if not config.training.recompute:
        return saved
    # Beside what is kept, one layer's own activations come back while its gradients are computed.
    module = build_on_meta(family, config, piece.layers, piece.trained, codebook)
    module.recompute = False
    whole = _saved_bytes(family, config, module, others, micro_batch)
    return saved + (whole - saved) // round(piece.kept or piece.evaluations)


def _saved_bytes(
    family: Family,
    config: RunConfig,
    module: TrainableModule,
    others: Sequence[TrainableModule],
    micro_batch: int,
) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, parameters left out."""
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    copies = [copy.deepcopy(other) for other in others]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = module.to_empty(device="cpu")
        before = [other.to_empty(device="cpu") for other in copies]
        own = {t.untyped_storage()._cdata for t in [*fake.parameters(), *fake.buffers()]}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bfloat16"),
        ):
            _loss(family, config, fake, before, micro_batch)
    return sum(storage.nbytes() for storage in saved.values())


def _loss(
    family: Family,
    config: RunConfig,
    module: TrainableModule,
    before: Sequence[TrainableModule],
    micro_batch: int,
) -> Tensor:
    """The training loss of an example batch, on the module's device; `before` are the blocks it goes on from."""
    device = next(module.parameters()).device
    draw = {name: value.to(device) for name, value in module.example_draw(micro_batch).items()}
    return module.training_loss(walk_to(before, family.example_batch(config, micro_batch), draw), draw)
