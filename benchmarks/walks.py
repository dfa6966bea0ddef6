"""Walks through blocks that are trained already: bridges, numbers of steps, and starting noises to average over.

    python benchmarks/walks.py runs/noise-vit/p-mean-1-* --bridges softmax argmax sample --steps 3 6 12
    python benchmarks/walks.py runs/noise-vit/p-mean-1-* --bridges softmax --steps 3 --noises 1 2 4 8 16
    python benchmarks/walks.py runs/dit-digits/blocks-* --steps 18 54

RUNS are run directories of one configuration, one a seed; the table has the mean over them and the standard deviation
of every read-out. Classifiers and causal or recurrent language models have a bridge from step to step; models of images
draw by Heun's method and by Euler's at as many network calls.
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
from dbtrain.diffusion.sampler import network_calls
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.evaluation import Evaluation
from dbtrain.inference.runs import model_at


def measure(model: AssembledModel, **chain: str | int) -> Evaluation:
    """The evaluation of a model that walks by these fields of its `chain` section.

    Raises:
        UserError: the shards that the model was trained on are gone.
    """
    section = model.config.chain.model_copy(update=chain)
    config = model.config.model_copy(update={"chain": section})
    return evaluate(dataclasses.replace(model, config=config))


def print_answers(
    models: Sequence[AssembledModel], bridges: Sequence[str], steps: Sequence[int], noises: Sequence[int]
) -> None:
    """A Markdown table of a chain that answers, one row a walk, each as soon as it is known."""
    print(f"| bridge | steps | noises | {' | '.join(READOUTS)} |\n" + "|---" * (3 + len(READOUTS)) + "|", flush=True)
    for bridge, count, starts in itertools.product(bridges, steps, noises):
        found = [measure(model, bridge=bridge, steps=count, start_noises=starts) for model in models]
        metric = found[0].metric
        cells = [summarise(metric, name, [evaluation.readouts[name] for evaluation in found]) for name in READOUTS]
        print(f"| {bridge} | {count} | {starts} | {' | '.join(cells)} |", flush=True)


def print_drawings(models: Sequence[AssembledModel], steps: Sequence[int]) -> None:
    """A Markdown table of a chain that draws: `steps` steps of Heun's method, and Euler's at as many network calls."""
    print("| solver | steps | network calls | Frechet distance |\n|---|---|---|---|", flush=True)
    for count in steps:
        found = [measure(model, solver="heun", steps=count) for model in models]
        calls = network_calls("heun", count)
        for solver, number in (("heun", count), ("euler", calls)):
            name = f"{solver}_{number}"
            cell = summarise(found[0].metric, name, [evaluation.readouts[name] for evaluation in found])
            print(f"| {solver} | {number} | {calls} | {cell} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--bridges", nargs="+", choices=get_args(Bridge), default=list(get_args(Bridge)), help="not for images"
    )
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    parser.add_argument(
        "--noises",
        type=int,
        nargs="+",
        help="starting noises of the averaged read-outs, in place of the recipe's; not for images",
    )
    arguments = parser.parse_args()
    models = [model_at(run) for run in arguments.runs]
    noises = arguments.noises or [models[0].config.chain.start_noises]
    if min(*arguments.steps, *noises) < 1:
        parser.error("a walk has at least one step, and starts from at least one noise")
    if models[0].config.model.family == "dit":
        print_drawings(models, arguments.steps)
    else:
        print_answers(models, arguments.bridges, arguments.steps, noises)


if __name__ == "__main__":
    main()
