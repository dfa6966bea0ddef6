"""Peak memory of a worker, measured beside the plan and beside the bound, by family and number of blocks.

    python benchmarks/memory.py configs/demo/*.yaml --blocks 1 2 3 6

For the costliest block of each cut, and for the end-to-end network, one training step is taken on random weights and
made-up samples: forward, backward, clipping, AdamW, average. "Peak" is the most bytes of tensors at once:

* on a CPU what PyTorch's allocator tells its profiler, every allocation and every release, in the order of time;
* on a GPU `torch.cuda.max_memory_allocated`, cuBLAS's workspaces included.

"Planned" is what `dbtrain plan` says, which has allocated nothing. "Share" is the block's peak over the end-to-end
network's. "Rest" is that of a block whose layers have been taken out: its stem, its head, and what they compute. The
bound is 1/B + rest + 0.03. (A recurrent block has all layers, however many blocks there are.) "Recompute" rows have
activation checkpointing on both sides.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config
from dbtrain.errors import UserError
from dbtrain.plan import Kind
from dbtrain.training.calibration import Step, costliest
from dbtrain.training.ema import EMA
from dbtrain.training.optimisation import make_optimizer
from dbtrain.training.planner import make_plan

MARGIN = 0.03


def measure(config: RunConfig, kind: Kind, device: torch.device, *, layers: bool = True) -> tuple[int, int]:
    """Bytes at the peak of a step, and those that were planned; the first without the block's layers if so asked."""
    plan = make_plan(config, kind)
    block = costliest(plan)
    before = _allocated(device)
    step = Step(config, plan, block, device)
    if not layers:
        _take_out_layers(step)
    step()  # makes the optimiser's state
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step.seconds()
        return torch.cuda.max_memory_allocated(device) - before, block.bytes.total
    step.optimizer.zero_grad()  # of what is there already, the profiler does not see that it goes
    moments = [value for fields in step.optimizer.state.values() for value in fields.values()]
    averages = [] if step.ema is None else step.ema.tensors().values()
    own = [*step.module.parameters(), *step.module.buffers(), *moments, *averages]
    return _bytes([*own, *step.batch.values(), *step.draw.values()]) + peak_of(step), block.bytes.total


def _take_out_layers(step: Step) -> None:
    for module in list(step.module.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList):
                setattr(module, name, nn.ModuleList())
    step.optimizer = make_optimizer(step.module, step.config.optimiser)
    step.ema = None if step.ema is None else EMA(step.module, step.config.ema)


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes allocated on the CPU and not yet released, of what a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = sorted((Path(__file__).parents[1] / "configs/demo").glob("*.yaml"))
    parser.add_argument("configs", type=Path, nargs="*", default=recipes, help="default: the recipes in configs/demo")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 3, 6])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    if not arguments.json:
        print("| family | recompute | B | peak, MB | planned / peak | share | rest | bound | holds |")
        print("|---|---|---|---|---|---|---|---|---|")
    for path in arguments.configs:
        for recompute in (False, True):
            overrides = [
                *arguments.overrides, f"training.recompute={str(recompute).lower()}",
                f"resources.device={device.type}", "blocks.split=null",
            ]  # fmt: skip
            config = load_config(path, [*overrides, "blocks.count=1"])
            whole, planned = measure(config, "end_to_end", device)
            rest = measure(config, "blocks", device, layers=False)[0] / whole
            row = {"family": config.model.family, "recompute": recompute, "rest": rest}
            rows.append(row | {"blocks": None, "peak": whole, "planned": planned})
            for count in arguments.blocks:
                try:
                    cut = load_config(path, [*overrides, f"blocks.count={count}"])
                except UserError:
                    continue  # more blocks than layers
                peak, planned = measure(cut, "blocks", device)
                bound = 1 / count + rest + MARGIN
                figures = {"peak": peak, "planned": planned, "share": peak / whole, "bound": bound}
                rows.append(row | {"blocks": count} | figures)
            if not arguments.json:
                done = (config.model.family, recompute)
                print(*(_line(row) for row in rows if (row["family"], row["recompute"]) == done), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


def _line(row: dict[str, Any]) -> str:
    cells = [row["family"], "yes" if row["recompute"] else "no"]
    measured = [f"{row['peak'] / 1e6:.2f}", f"{row['planned'] / row['peak']:.3f}"]
    if row["blocks"] is None:
        cells += ["end to end", *measured, "", f"{row['rest']:.2f}", "", ""]
    else:
        holds = "yes" if row["share"] <= row["bound"] else "no"
        cells += [str(row["blocks"]), *measured, f"{row['share']:.2f}", "", f"{row['bound']:.2f}", holds]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
