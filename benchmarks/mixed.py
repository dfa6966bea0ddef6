"""Networks whose blocks come from different runs: are there settings that suit one block and not the next?

    python benchmarks/mixed.py runs/a-seed0+runs/b-seed0+runs/b-seed0 runs/a-seed1+runs/b-seed1+runs/b-seed1

Blocks are strangers to each other, so that any block of one run can stand where the same block of another run stood.
Every argument is a network: run directories joined by +, the first gives block 0, the second block 1, and so on. The
chain is the first run's. Prints the mean over the networks (seeds) and the standard deviation of all their figures.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from quality import figures_of, print_tables

from dbtrain.assembly.loading import AssembledModel
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.runs import model_at


def mixed(runs: list[str]) -> AssembledModel:
    """Block b of run b.

    Raises:
        UserError, CorruptData: as `model_at`.
        ValueError: blocks of these runs do not fit together; str() says why.
    """
    models = [model_at(run) for run in runs]
    first = models[0]
    if any(len(model.modules) != len(runs) for model in models):
        raise ValueError(f"{' '.join(runs)}: {len(runs)} runs make a network of {len(runs)} blocks; these have others")
    for run, model in zip(runs, models, strict=True):
        if model.ranges != first.ranges or model.config.model != first.config.model:
            raise ValueError(f"{run} has other noise ranges or another architecture than {runs[0]}")
        if first.codebook is not None and (model.codebook is None or not torch.equal(model.codebook, first.codebook)):
            raise ValueError(f"{run} has another codebook than {runs[0]}: it comes from the seed")
    blocks = tuple(model.modules[index] for index, model in enumerate(models))
    return dataclasses.replace(first, modules=blocks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="RUN+RUN+...")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    for network in arguments.networks:
        try:
            evaluation = evaluate(mixed(network.split("+")))
        except ValueError as error:
            parser.error(str(error))
        for name, value in figures_of(evaluation).items():
            found.setdefault(name, []).append(value)
    print_tables(evaluation.metric, {"mixed": found}, len(arguments.networks))


if __name__ == "__main__":
    main()
