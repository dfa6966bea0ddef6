"""Bridges and numbers of steps of the chain, on blocks that are trained already.

    python benchmarks/walks.py runs/noise-vit/p-mean-1-* --bridges softmax argmax sample --steps 3 6 12

RUNS are run directories of one configuration, one a seed; the table has the mean over them and the standard deviation
of every read-out. For families whose chain has a bridge: classifiers and causal or recurrent language models.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from typing import get_args

from quality import summarise

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import READOUTS, Bridge
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.evaluation import Evaluation
from dbtrain.inference.runs import model_at


def measure(model: AssembledModel, bridge: str, steps: int) -> Evaluation:
    """The evaluation of a walk of `steps` steps with that bridge.

    Raises:
        UserError: the shards that the model was trained on are gone.
    """
    chain = model.config.chain.model_copy(update={"bridge": bridge, "steps": steps})
    config = model.config.model_copy(update={"chain": chain})
    return evaluate(dataclasses.replace(model, config=config))


def print_table(models: Sequence[AssembledModel], bridges: Sequence[str], steps: Sequence[int]) -> None:
    """A Markdown table, one row a walk, each as soon as it is known."""
    print(f"| bridge | steps | {' | '.join(READOUTS)} |\n" + "|---" * (2 + len(READOUTS)) + "|", flush=True)
    for bridge, count in itertools.product(bridges, steps):
        found = [measure(model, bridge, count) for model in models]
        metric = found[0].metric
        cells = [summarise(metric, name, [evaluation.readouts[name] for evaluation in found]) for name in READOUTS]
        print(f"| {bridge} | {count} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--bridges", nargs="+", choices=get_args(Bridge), default=list(get_args(Bridge)))
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    if min(arguments.steps) < 1:
        parser.error("a walk has at least one step")
    models = [model_at(run) for run in arguments.runs]
    print_table(models, arguments.bridges, arguments.steps)


if __name__ == "__main__":
    main()
