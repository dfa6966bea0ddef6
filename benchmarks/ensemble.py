"""An honest ensemble: end-to-end classifiers of other seeds answer together, as the blocks of a chain do.

    python benchmarks/ensemble.py runs/one-layer-seed0+runs/one-layer-seed1+runs/one-layer-seed2 ...

Every argument is an ensemble: run directories of end-to-end networks on the same data, joined by +. Prints what each
says alone, the normalised geometric mean of all answers (`product`, as the chain's read-out), and the mean of their
probabilities; over several ensembles the mean and the standard deviation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from quality import print_tables

from dbtrain.data.batches import make_transform
from dbtrain.data.loader import iterate_split
from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.chain import pool
from dbtrain.inference.classify import Classifier
from dbtrain.inference.evaluation import ACCURACY
from dbtrain.inference.runs import model_at
from dbtrain.models import family_of


@torch.inference_mode()
def accuracies(runs: list[str]) -> dict[str, float]:
    """Accuracy on the test rows: of each network in the mean, and of all together.

    Raises:
        UserError, CorruptData: as `model_at`.
        ValueError: these are no end-to-end networks of one dataset; str() says which.
    """
    classifiers = [Classifier(model_at(run)) for run in runs]
    first = classifiers[0].model
    facts, path = first.plan.data, first.config.data.path
    assert facts is not None
    assert path is not None
    for run, classifier in zip(runs, classifiers, strict=True):
        data = classifier.model.plan.data
        if not classifier.model.end_to_end or data is None or data.sha256 != facts.sha256:
            raise ValueError(f"{run} is no end-to-end network on the data of {runs[0]}")
    transform = make_transform(first.config, facts, family_of(first.config).scaling(first.config, facts), None)
    shards = ShardSet.open(Path(path), "test")
    hits: dict[str, float] = {"alone": 0.0, "product": 0.0, "mean of probabilities": 0.0}
    for batch in iterate_split(shards, transform, 500):
        said = [classifier.logits(batch["image"]).float().log_softmax(dim=-1) for classifier in classifiers]

        def right(answers: torch.Tensor, labels: torch.Tensor = batch["label"]) -> float:
            return float((answers.argmax(dim=-1) == labels).sum())

        hits["alone"] += sum(map(right, said)) / len(said)
        hits["product"] += right(pool(said))
        hits["mean of probabilities"] += right(torch.stack(said).exp().mean(dim=0))
    return {name: count / shards.rows for name, count in hits.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensembles", nargs="+", metavar="RUN+RUN+...")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    for ensemble in arguments.ensembles:
        try:
            figures = accuracies(ensemble.split("+"))
        except ValueError as error:
            parser.error(str(error))
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    print_tables(ACCURACY, {"ensembles": found}, len(arguments.ensembles))


if __name__ == "__main__":
    main()
