"""Our trainer beside a bare PyTorch loop of the same block: steps a second, and what a checkpoint holds up.

    python benchmarks/trainer.py [configs/demo/*.yaml] [--turns 20] [--json]

Block 0 of each recipe is trained by the trainer as in any run (shards, sample order, augmentation, keyed noise, guard,
average, metrics, checkpoints) and by a loop that has none of that: the same module, loss, optimiser and schedule, a
plain generator for the noise, and batches that lie in memory. A second loop also averages the weights, with PyTorch's
AveragedModel at a fixed decay (which copies the buffers at each step, too). All are in this process and take turns, a
logging interval each; which one begins changes from turn to turn.

* ratio: the median over the turns of the loop's time over the trainer's; ratio_all: that of the sums, in which the
  recipe's checkpoints take part; ratio_cpu: the median ratio of processor time, in which the thread that
  writes counts, and other programs on the machine do not;
* ratio_averaging: the same of the second loop;
* stall: time that the trainer's loop spends on a checkpoint, the median of three or more (the first takes longer, as
  its memory is new); the writing is in the background.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import table
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config
from dbtrain.data.prepare import ensure_prepared
from dbtrain.models import Batch
from dbtrain.run_directory import RunDirectory
from dbtrain.training.optimisation import learning_rate, make_optimizer
from dbtrain.training.planner import make_plan
from dbtrain.training.trainer import BlockTrainer

RECIPES = tuple(sorted((Path(__file__).parents[1] / "configs" / "demo").glob("*.yaml")))
_BATCHES = 32


class BareLoop:
    """What one would write for this block without us: no data loader, no guard, nothing told or saved."""

    def __init__(self, trainer: BlockTrainer, batches: Sequence[Batch], *, averaging: bool):
        config = trainer.config
        self.config, self.batches, self.device = config, batches, trainer.device
        self.module = copy.deepcopy(trainer.module)
        self.optimizer = make_optimizer(self.module, config.optimiser)
        self.generator = torch.Generator(trainer.device).manual_seed(0)
        averages = get_ema_multi_avg_fn(0.99)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.module, multi_avg_fn=averages) if averaging else None
        self.done = 0

    def run(self, steps: int) -> float:
        """Train so many steps; returns the last loss, and so waits for the device."""
        config = self.config
        for _ in range(steps):
            batch = self.batches[self.done % len(self.batches)]
            draw = self.module.draw(config.training.batch_size, self.generator)
            rate = learning_rate(self.done, config.training.steps, config.optimiser.lr, config.schedule)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.training.precision == "bfloat16"):
                loss = self.module.training_loss(batch, draw)
            loss.backward()  # type: ignore[no-untyped-call]
            if config.optimiser.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.optimiser.clip_norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.module)
            self.done += 1
        return float(loss.detach())


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a call takes, and seconds of processor time that this process spends meanwhile."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of those taken in one turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def open_trainer(config: RunConfig, folder: Path) -> BlockTrainer:
    """Block 0 of a new run, nothing trained."""
    plan = make_plan(config, "blocks", ensure_prepared(config).facts())
    return BlockTrainer(RunDirectory.create_or_resume(folder, config, plan), 0, attempt=1)


def measure(config: RunConfig, turns: int, folder: Path) -> dict[str, Any]:
    """The row of one recipe."""
    steps = config.logging.every
    stalls: list[float] = []
    with closing(open_trainer(config, folder)) as trainer:
        save = trainer._save
        trainer._save = lambda: stalls.append(timed(save)[0])  # type: ignore[method-assign]
        batches = [trainer._loader.batch(step) for step in range(_BATCHES)]
        bare = [BareLoop(trainer, batches, averaging=averaging) for averaging in (False, True)]
        reports = trainer.train()
        next(reports)
        sides: list[Callable[[], object]] = [lambda: next(reports), *(partial(loop.run, steps) for loop in bare)]
        for side in sides:
            side()  # warm up
        times: list[list[tuple[float, float]]] = [[] for _ in sides]
        for turn in range(turns):
            for number in range(len(sides)):
                number = (number + turn) % len(sides)
                times[number].append(timed(sides[number]))
        while len(stalls) < 3:
            trainer._store.settled()
            trainer._save()
    (ours, ours_cpu), (plain, plain_cpu), (averaging, _) = (list(zip(*side, strict=True)) for side in times)
    stall = statistics.median(stalls)
    return {
        "family": config.model.family,
        "steps": steps * turns,
        "ms_a_step": 1e3 * statistics.median(ours) / steps,
        "bare_ms_a_step": 1e3 * statistics.median(plain) / steps,
        "ratio": median_ratio(plain, ours),
        "ratio_all": sum(plain) / sum(ours),
        "ratio_averaging": median_ratio(averaging, ours),
        "ratio_cpu": median_ratio(plain_cpu, ours_cpu),
        "stall_ms": 1e3 * stall,
        "stall_first_ms": 1e3 * stalls[0],
        "stall_percent_of_a_minute": 100 * stall / 60,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="*", default=RECIPES)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = []
    for path in arguments.configs:
        config = load_config(path, arguments.overrides)
        # The run is long enough for all turns, whatever the recipe's length.
        least = config.logging.every * (arguments.turns + 2)
        if config.training.steps < least:
            config = load_config(path, [*arguments.overrides, f"training.steps={least}"])
        torch.set_num_threads(config.resources.threads)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(config, arguments.turns, Path(folder)))
        print(f"{path.stem}: {rows[-1]['ratio']:.3f}", file=sys.stderr, flush=True)
    figures = {"turns": arguments.turns, "rows": rows}
    print(json.dumps(figures) if arguments.json else table(figures))


if __name__ == "__main__":
    main()
