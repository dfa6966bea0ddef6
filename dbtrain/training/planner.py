"""RunConfig -> Plan: layers, noise ranges, and the exact bytes and FLOPs of each block, allocating nothing.

Each block is built on PyTorch's `meta` device, where tensors have shapes and no storage, and one training step is
traced there: parameters and buffers are counted from the module, FLOPs by PyTorch's counter. Which tensors autograd
saves depends on the kernels and on autocast, so activations are counted on fake tensors that dispatch as a CPU's do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbtrain.config import RunConfig
from dbtrain.diffusion.codebook import digest
from dbtrain.diffusion.partition import partition, widen
from dbtrain.errors import CorruptData
from dbtrain.models import Family, TrainableModule, family_of
from dbtrain.plan import BlockPlan, Bytes, DatasetFacts, Kind, NoiseRange, Plan, split_layers


def make_plan(config: RunConfig, kind: Kind = "blocks", data: DatasetFacts | None = None) -> Plan:
    """The plan of `config`: block-wise, or of its end-to-end baseline (one block that owns every layer)."""
    family = family_of(config)
    codebook = family.codebook(config) if kind == "blocks" else None
    blocks = []
    measured: dict[int, tuple[int, Bytes, int]] = {}  # by number of layers: the noise range changes no size
    for index, piece in enumerate(_cut(config, kind)):
        size = piece.layers[1] - piece.layers[0]
        if size not in measured:
            module = build_on_meta(family, config, piece.layers, piece.trained, codebook)
            measured[size] = _measure(family, config, module)
        parameters, resident, flops = measured[size]
        blocks.append(
            BlockPlan(
                index=index,
                layers=piece.layers,
                noise=piece.noise,
                trained=piece.trained,
                parameters=parameters,
                bytes=resident,
                flops_per_sample=flops,
            )
        )
    return Plan(
        kind=kind,
        name=config.name,
        config_sha256=config.digest(),
        codebook_sha256=None if codebook is None else digest(codebook),
        seed=config.seed,
        steps=config.training.steps,
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
    training = config.training
    cut = _cut(config, plan.kind)
    if (
        (plan.seed, plan.steps, plan.batch_size) != (config.seed, training.steps, training.batch_size)
        or plan.threads != config.resources.threads
        or [block.index for block in plan.blocks] != list(range(len(cut)))
        or not all(_same_piece(block, piece) for block, piece in zip(plan.blocks, cut, strict=True))
    ):
        raise CorruptData("plan.json of the run is not the plan that its config.yaml gives")
    if codebook is not None and digest(codebook) != plan.codebook_sha256:
        raise CorruptData(
            "the codebook made from the seed is not the one the plan was made with",
            field="codebook_sha256",
            value=plan.codebook_sha256,
            mend="use the versions of dbtrain, PyTorch and numpy that the run was started with",
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


@dataclass(frozen=True)
class _Piece:
    layers: tuple[int, int]
    noise: NoiseRange | None
    trained: NoiseRange | None


def _cut(config: RunConfig, kind: Kind) -> list[_Piece]:
    if kind == "end_to_end":
        return [_Piece((0, config.model.depth), None, None)]
    ranges = partition(config.noise, config.blocks)
    layers = split_layers(config.model.depth, config.blocks.count, config.blocks.split)
    trained = widen(ranges, config.blocks.overlap, config.noise)
    return [_Piece(*piece) for piece in zip(layers, ranges, trained, strict=True)]


def _same_piece(block: BlockPlan, piece: _Piece) -> bool:
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
        return family.build_end_to_end(config)
    return family.build_block(config, layers, trained, codebook)


def _measure(family: Family, config: RunConfig, module: TrainableModule) -> tuple[int, Bytes, int]:
    """Parameters of a module on the meta device, its bytes at the configured micro-batch, and FLOPs a sample."""
    micro_batch = config.training.batch_size // config.training.accumulate
    parameters = list(module.parameters())
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        _loss(family, config, module, micro_batch).backward()  # type: ignore[no-untyped-call]
    return (
        sum(p.numel() for p in parameters),
        Bytes(
            parameters=weights,
            buffers=buffers,
            gradients=weights,
            # AdamW: two moments a weight, and one float32 step counter a tensor.
            optimiser=2 * weights + 4 * len(parameters),
            ema=weights if config.ema.half_life > 0 else 0,
            activations=_saved_bytes(family, config, module, micro_batch),
        ),
        int(counter.get_total_flops()) // micro_batch,
    )


def _saved_bytes(family: Family, config: RunConfig, module: TrainableModule, micro_batch: int) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, parameters left out."""
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = module.to_empty(device="cpu")
        own = {t.untyped_storage()._cdata for t in [*fake.parameters(), *fake.buffers()]}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bfloat16"),
        ):
            _loss(family, config, fake, micro_batch)
    return sum(storage.nbytes() for storage in saved.values())


def _loss(family: Family, config: RunConfig, module: TrainableModule, micro_batch: int) -> Tensor:
    """The training loss of an example batch, on the module's device."""
    device = next(module.parameters()).device
    batch = family.example_batch(config, micro_batch)
    draw = module.draw(micro_batch, torch.Generator("cpu"))
    return module.training_loss(batch, {name: value.to(device) for name, value in draw.items()})
