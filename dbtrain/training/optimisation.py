"""The optimiser, its learning rate, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dbtrain.config import OptimiserConfig, ScheduleConfig


class Adafactor(torch.optim.Adafactor):
    """PyTorch's, which passes over a step where `found_inf` is 1, as its fused optimisers do."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; waits for the device, as Adafactor does for the norm of every tensor anyhow."""
        found_inf, self.found_inf = self.found_inf, None  # which PyTorch's would refuse
        if found_inf is None or not bool(found_inf):
            super().step(closure)  # type: ignore[no-untyped-call]


def make_optimizer(module: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """Fused AdamW, or Adafactor; weight decay for the matrices of linear layers alone, not for biases, norms and
    embeddings."""
    matrices = {id(child.weight) for child in module.modules() if isinstance(child, nn.Linear)}
    decayed = [p for p in module.parameters() if id(p) in matrices]
    others = [p for p in module.parameters() if id(p) not in matrices]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adafactor":
        return Adafactor(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def state_bytes(config: OptimiserConfig, sizes: Sequence[int], parameters: Sequence[Tensor]) -> int:
    """Bytes of the optimiser's state for `parameters`, of which a worker holds `sizes` bytes each."""
    counters = 4 * len(parameters)  # one float32 a tensor
    if config.kind == "adamw":
        return 2 * sum(sizes) + counters
    kept = (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel() for p in parameters)
    return 4 * sum(kept) + counters


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all of them together, on the device; the bits are those of `torch.nn.utils.get_total_norm`.

    That sorts the tensors by device and type first, which takes as long as the sums where tensors are small, and those
    of a block have one device and one type.
    """
    if type(grads[0]) is not Tensor:  # parts of what is spread over workers: DTensors
        return torch.nn.utils.get_total_norm(grads)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return norm


def learning_rate(step: int, total: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of the optimiser step that follows `step` finished ones: linear warm-up, then cosine or constant."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (1 + math.cos(math.pi * progress))


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state under names `parameter/field`, without copies."""
    return {
        f"{name}/{field}": value
        for name, parameter in module.named_parameters()
        for field, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Put back what `optimizer_tensors` gave, on `device`, in place of what the optimiser has."""
    optimizer.state.clear()
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        optimizer.state[parameters[name]][field] = value.to(device)
