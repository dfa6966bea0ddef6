"""What private stems cost: the same blocks with stems that are averaged every few steps, in one process.

    python benchmarks/averaged_stems.py configs/demo/causal_lm.yaml --every 25 --seeds 0 1 2 --runs runs/averaged

All blocks train in this one process, in turns of --every steps; after each turn the parameters outside the layers
(embedding, noise embedding, final norm, head) are set to their mean over the blocks. It does not resume, and needs
neither Ray nor a network; `blocks.stem=averaged` is the same between workers (docs/averaged-stems.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from quality import figures_of, print_tables

from dbtrain.config_file import load_config
from dbtrain.data.prepare import ensure_prepared
from dbtrain.inference.runs import evaluation_of
from dbtrain.run_directory import RunDirectory
from dbtrain.training.planner import make_plan
from dbtrain.training.stem import stem_of
from dbtrain.training.trainer import BlockTrainer


@torch.no_grad()
def average_stems(trainers: Sequence[BlockTrainer]) -> None:
    """Set what is outside the layers to its mean over the blocks."""
    stems = [stem_of(trainer.module) for trainer in trainers]
    for name in stems[0]:
        mean = torch.stack([stem[name] for stem in stems]).mean(dim=0)
        for stem in stems:
            stem[name].copy_(mean)


def train(config_file: Path, overrides: Sequence[str], every: int, folder: Path) -> RunDirectory:
    """All blocks side by side, averaged every `every` steps."""
    config = load_config(config_file, [*overrides, f"logging.every={every}"])
    plan = make_plan(config, "blocks", ensure_prepared(config).facts())
    run = RunDirectory.create_or_resume(folder, config, plan)
    with ExitStack() as stack:
        trainers = [stack.enter_context(closing(BlockTrainer(run, block.index, 1))) for block in plan.blocks]
        turns = [trainer.train() for trainer in trainers]
        while not all(progress.done for progress in [next(turn) for turn in turns]):
            average_stems(trainers)
    return run


def main() -> None:
    """Train, evaluate, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parser.parse_args()
    rows: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        folder = arguments.runs / f"every{arguments.every}-seed{seed}"
        run = train(arguments.config, [*arguments.overrides, f"seed={seed}"], arguments.every, folder)
        evaluation = evaluation_of(run)
        for key, value in figures_of(evaluation).items():
            rows.setdefault(key, []).append(value)
        print(f"{folder}: {json.dumps(figures_of(evaluation))}", flush=True)
    print_tables(evaluation.metric, {f"stems averaged every {arguments.every} steps": rows}, len(arguments.seeds))


if __name__ == "__main__":
    main()
