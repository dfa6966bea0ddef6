"""Bytes of a worker, measured beside the plan and beside the paper's formula, by family and number of blocks.

    python benchmarks/memory.py configs/demo/*.yaml --blocks 1 2 3 6

For block 0 of each cut, and for the end-to-end network, one real training step is taken on random data:

* state: parameters, buffers, gradients and AdamW's moments, counted from the tensors;
* saved: bytes of the distinct storages that autograd keeps for the way back, by saved-tensor hooks;
* peak: on a CPU the most bytes alive at once in forward and backward, beside the state, by watching every storage that
  an operation returns; on a GPU `torch.cuda.max_memory_allocated` less the state.

"ratio" is measured state + saved of the block over that of the end-to-end network; "formula" is the share of the layer
evaluations that gradients go through: the paper's (4P + A) L / B over (4P + A) L, that is 1/B without stems and heads.
(A recurrent block has all layers and evaluates its core once; there the formula is that of the activations.)
"recompute" rows have activation checkpointing on both sides, where what counts is state + peak.
"""

from __future__ import annotations

import argparse
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config
from dbtrain.errors import UserError
from dbtrain.models import family_of
from dbtrain.plan import Kind
from dbtrain.training.optimisation import make_optimizer
from dbtrain.training.planner import build_module, make_plan


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once, of storages that operations have returned since the start."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or storage.nbytes() == 0:
            return
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)


@dataclass(frozen=True)
class Measured:
    """Bytes of one worker."""

    state: int
    saved: int
    peak: int
    planned: int
    """State and activations, by `dbtrain plan`."""


def measure(config: RunConfig, kind: Kind, device: torch.device) -> Measured:
    """One training step of block 0, or of the end-to-end network."""
    plan = make_plan(config, kind)
    block, family = plan.blocks[0], family_of(config)
    codebook = family.codebook(config) if kind == "blocks" else None
    torch.manual_seed(0)
    module = build_module(family, config, block.layers, block.trained, codebook).to(device).train()
    batch_size = config.training.batch_size // config.training.accumulate
    with torch.device(device):
        batch = family.example_batch(config, batch_size)
    draw = {name: value.to(device) for name, value in module.example_draw(batch_size).items()}
    optimizer = make_optimizer(module, config.optimiser)
    saved = saved_bytes(module, batch, draw)

    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        module.training_loss(batch, draw).backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            module.training_loss(batch, draw).backward()
        peak = live.peak
    optimizer.step()
    moments = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    own = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    grads = sum(p.grad.numel() * p.grad.element_size() for p in module.parameters() if p.grad is not None)
    size = block.bytes
    planned = size.parameters + size.buffers + size.gradients + size.optimiser + size.activations
    return Measured(own + grads + moments, saved, peak, planned)


def saved_bytes(module: Any, batch: Any, draw: Any) -> int:
    """Distinct storages that autograd keeps for the way back, the module's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module.training_loss(batch, draw)  # the graph holds every storage until the sum is taken
    total = sum(kept.values())
    del loss
    return total


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 3, 6])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    print("| family | recompute | B | state, kB | saved, kB | peak, kB | planned, kB | ratio | with peak | formula |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for path in arguments.configs:
        for recompute in (False, True):
            overrides = [*arguments.overrides, f"training.recompute={str(recompute).lower()}"]
            config = load_config(path, [*overrides, "blocks.count=1", "blocks.split=null"])
            whole = measure(config, "end_to_end", device)
            cuts: list[tuple[str, Measured, float]] = [("end to end", whole, 1.0)]
            family = family_of(config)
            piece = family.whole(config)
            kept = piece.kept or piece.evaluations
            for count in arguments.blocks:
                try:
                    cut = load_config(path, [*overrides, f"blocks.count={count}", "blocks.split=null"])
                except UserError:
                    continue  # more blocks than layers
                cuts.append((str(count), measure(cut, "blocks", device), family.cut(cut)[0].evaluations / kept))
            for name, found, formula in cuts:
                ratio = (found.state + found.saved) / (whole.state + whole.saved)
                with_peak = (found.state + found.peak) / (whole.state + whole.peak)
                print(
                    f"| {config.model.family} | {'yes' if recompute else 'no'} | {name} | {found.state / 1e3:,.0f} |"
                    f" {found.saved / 1e3:,.0f} | {found.peak / 1e3:,.0f} | {found.planned / 1e3:,.0f} | {ratio:.2f} |"
                    f" {with_peak:.2f} | {formula:.2f} |",
                    flush=True,
                )
                rows.append({"family": config.model.family, "recompute": recompute, "blocks": name, **vars(found)})
    if arguments.json is not None:
        about = {"torch": torch.__version__, "device": str(device)}
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
