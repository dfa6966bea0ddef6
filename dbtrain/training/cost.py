"""What one worker needs to train a piece of a network: bytes and FLOPs, found by tracing a step, allocating nothing.

Modules are built on PyTorch's `meta` device, where tensors have shapes and no storage: parameters and buffers are
counted there, and FLOPs by PyTorch's counter. Which tensors autograd saves, and what else is alive on the way back,
depends on kernels and autocast: so forward and backward are traced again, on fake tensors that dispatch as a CPU's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbtrain.config import RunConfig
from dbtrain.models import Batch, Draw, Family, Piece, TrainableModule
from dbtrain.models.family import walk_to
from dbtrain.models.layers import layers_of
from dbtrain.plan import Bytes
from dbtrain.training.live_bytes import LiveBytes
from dbtrain.training.optimisation import state_bytes


class Cost(NamedTuple):
    """Of one worker."""

    parameters: int
    """Number of trained scalars."""
    bytes: Bytes
    flops_per_sample: int


def cost_of(
    family: Family,
    config: RunConfig,
    piece: Piece,
    before: Sequence[Piece],
    build: Callable[[Piece], TrainableModule],
) -> Cost:
    """The cost of a piece at the configured micro-batch.

    Args:
        family: of the network.
        config: the run.
        piece: what the worker trains.
        before: where blocks relay, the pieces whose weights it holds, too, to compute their features.
        build: makes the module of a piece on the `meta` device.
    """
    module, others = build(piece), [build(other) for other in before]
    training, resources = config.training, config.resources
    rows = training.batch_size // training.accumulate // resources.replicas
    parameters, frozen = list(module.parameters()), [*module.buffers(), *_tensors(*others)]
    # DDP keeps all on every replica, and its buckets are the gradients themselves.
    ways = resources.replicas if resources.shard else 1
    weights = sum(_part_bytes(p, ways) for p in parameters)
    draw = module.example_draw(rows)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        batch = family.example_batch(config, rows)
        _loss(module, others, batch, _to_meta(draw)).backward()  # type: ignore[no-untyped-call]
    # A micro-batch is rows of a whole one. Replicas draw for the batch of all of them, and copy their share.
    copies = 1 if resources.replicas == 1 else resources.replicas + 1
    inputs = training.accumulate * (_bytes(batch.values()) + copies * _bytes(draw.values()))
    saved, made, alive = _step_bytes(config, module, others, batch, _to_meta(draw))
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        bytes=Bytes(
            parameters=weights,
            buffers=_bytes(frozen),
            gradients=weights if _gradients_stay(config) else made,
            optimiser=state_bytes(config.optimiser, [_part_bytes(p, ways) for p in parameters], parameters),
            ema=weights if config.ema.half_life > 0 else 0,
            activations=saved,
            temporary=inputs + alive - saved - made,
            gathered=_gathered_bytes(module) if resources.shard else 0,
        ),
        flops_per_sample=int(counter.get_total_flops()) // rows,
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
    layers = [_bytes(layer.parameters()) for layer in layers_of(module)]
    rest = _bytes(module.parameters()) - sum(layers)
    ahead = sorted(layers)[-2:]
    return rest + sum(ahead) + 2 * max(rest, *ahead, 0)


def _step_bytes(
    config: RunConfig, module: TrainableModule, others: Sequence[TrainableModule], batch: Batch, draw: Draw
) -> tuple[int, int, int]:
    """Of forward and backward, all on the meta device before: bytes of the distinct storages that autograd keeps in
    between; the gradients that have been made when most is alive; and the most bytes alive at once. The modules' own
    tensors and gradients that stay from step to step are in none of them, batch and draw not in the last.

    The optimiser works in place (AdamW) or tensor by tensor (Adafactor), when no activation is alive any more.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    for parameter in module.parameters():
        parameter.grad = None
    with FakeTensorMode(allow_non_fake_inputs=True):
        held = list(_tensors(*(one.to_empty(device="cpu") for one in (module, *others))))
        own = {tensor.untyped_storage()._cdata for tensor in held}
        staying = []
        if _gradients_stay(config):
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
                staying.append(parameter.grad)
        batch, draw = (
            {name: torch.empty_like(value, device="cpu") for name, value in part.items()} for part in (batch, draw)
        )

        def made() -> int:
            return _bytes(p.grad for p in module.parameters() if p.grad is not None) - _bytes(staying)

        with LiveBytes([*held, *staying, *batch.values(), *draw.values()], part=made) as live:
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bfloat16"),
            ):
                loss = _loss(module, others, batch, draw)
            kept = sum(storage.nbytes() for storage in saved.values())
            saved.clear()
            loss.backward()  # type: ignore[no-untyped-call]
    # A peak on the way back may stand where some activations are gone: together they are never counted as more.
    return kept, min(live.part_at_peak, live.peak - kept), live.peak


def _gradients_stay(config: RunConfig) -> bool:
    """Whether they are there when a backward pass begins: those of the parts before, or buckets that replicas share."""
    return config.training.accumulate > 1 or config.resources.replicas > 1


def _to_meta(draw: Draw) -> Draw:
    return {name: value.to("meta") for name, value in draw.items()}


def _loss(module: TrainableModule, others: Sequence[TrainableModule], batch: Batch, draw: Draw) -> Tensor:
    return module.training_loss(walk_to(others, batch, draw), draw)


def _tensors(*modules: TrainableModule) -> Iterable[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
