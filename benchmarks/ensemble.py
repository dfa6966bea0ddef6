"""An honest ensemble: end-to-end classifiers of different seeds answer together, as the blocks of a chain do.

    python benchmarks/ensemble.py runs/one-layer-seed0+runs/one-layer-seed1+runs/one-layer-seed2 ...

Every argument is an ensemble: run directories of end-to-end networks on the same data, joined by +. Prints the
accuracy of a member in the mean, of the normalised geometric mean of all answers (`product`, as the chain's read-out),
and of the mean of their probabilities; over several ensembles the mean and the standard deviation.
"""

from __future__ import annotations

import torch
from quality import print_joined

from dbtrain.data.batches import make_transform
from dbtrain.data.loader import iterate_split
from dbtrain.diffusion.chain import pool
from dbtrain.errors import UserError
from dbtrain.inference.classify import Classifier
from dbtrain.inference.evaluate import open_shards
from dbtrain.inference.evaluation import ACCURACY
from dbtrain.inference.runs import model_at
from dbtrain.models import family_of


@torch.inference_mode()
def accuracies(runs: list[str]) -> dict[str, float]:
    """Accuracy on the test rows: of each network in the mean, and of all together.

    Raises:
        UserError, CorruptData: as `model_at` and `open_shards`; or these are no end-to-end networks of one dataset.
    """
    models = [model_at(run) for run in runs]
    first, facts = models[0], models[0].plan.data
    assert facts is not None
    for run, model in zip(runs, models, strict=True):
        assert model.plan.data is not None
        classifies = family_of(model.config).task == "classify"
        if not classifies or not model.end_to_end or model.plan.data.sha256 != facts.sha256:
            problem = f"is no end-to-end classifier on the data of {runs[0]}"
            raise UserError(problem, field="RUN+RUN+...", value=run, mend="take baselines of one dataset")
    classifiers = [Classifier(model) for model in models]
    transform = make_transform(first.config, facts, family_of(first.config).scaling(first.config, facts), None)
    shards = open_shards(first, "test")
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
    print_joined(__doc__, "together", lambda runs: (ACCURACY, accuracies(runs)))


if __name__ == "__main__":
    main()
