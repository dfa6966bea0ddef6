"""Networks whose blocks come from different runs: are there settings that suit one block and not the next?

    python benchmarks/mixed.py runs/a-seed0+runs/b-seed0+runs/b-seed0 runs/a-seed1+runs/b-seed1+runs/b-seed1

Blocks are strangers to each other, so that any block of one run can stand where the same block of another run stood.
Every argument is a network: run directories joined by +, the first gives block 0, the second block 1, and so on. The
chain is the first run's. Prints the mean over the networks (seeds) and the standard deviation of all their figures.
"""

from __future__ import annotations

import dataclasses

import torch
from quality import figures_of, print_joined

from dbtrain.assembly.loading import AssembledModel
from dbtrain.errors import UserError
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.evaluation import Metric
from dbtrain.inference.runs import model_at
from dbtrain.models.family import relays


def mixed(runs: list[str]) -> AssembledModel:
    """Block b of run b.

    Raises:
        UserError, CorruptData: as `model_at`, and where blocks of these runs do not fit together.
    """
    models = [model_at(run) for run in runs]
    first = models[0]
    for run, model in zip(runs, models, strict=True):
        problem = _misfit(model, first, len(runs))
        if problem is not None:
            raise UserError(
                problem, field="RUN+RUN+...", value=run, mend=f"take runs that differ from {runs[0]} in rates alone"
            )
    blocks = tuple(model.modules[index] for index, model in enumerate(models))
    return dataclasses.replace(first, modules=blocks)


def _misfit(model: AssembledModel, first: AssembledModel, blocks: int) -> str | None:
    """Why a block of `model` cannot stand among those of `first`, if it cannot."""
    assert model.plan.data is not None
    assert first.plan.data is not None
    if len(model.modules) != blocks:
        return f"has {len(model.modules)} blocks, and {blocks} runs make a network of {blocks}"
    if relays(model.config, model.plan.kind):
        return "has blocks that go on from each other (blocks.relay_every)"
    if model.plan.data.sha256 != first.plan.data.sha256:
        return "was trained on other data"
    if model.ranges != first.ranges or model.config.model != first.config.model:
        return "has other noise ranges or another architecture"
    if first.codebook is not None and (model.codebook is None or not torch.equal(model.codebook, first.codebook)):
        return "has another codebook, which comes from the seed"
    return None


def main() -> None:
    """Print the table."""

    def measure(runs: list[str]) -> tuple[Metric, dict[str, float]]:
        evaluation = evaluate(mixed(runs))
        return evaluation.metric, figures_of(evaluation)

    print_joined(__doc__, "mixed", measure)


if __name__ == "__main__":
    main()
