"""Evaluating any assembled model on a split of the data it was trained with."""

from __future__ import annotations

from pathlib import Path

from dbtrain.assembly.loading import AssembledModel
from dbtrain.data.manifest import MANIFEST_FILE, Split
from dbtrain.data.node_cache import local_shards
from dbtrain.data.shards import ShardSet
from dbtrain.errors import UserError
from dbtrain.inference.evaluation import Evaluation, Progress
from dbtrain.models import family_of


def evaluate(
    model: AssembledModel,
    split: Split = "test",
    *,
    data: str | Path | None = None,
    judge: AssembledModel | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate on a split of the data the model was trained with; what is measured follows from the family's task.

    Args:
        data: the folder of the shards or its URI, where they are not (any more) where the run's configuration says.
        judge: an end-to-end model of the same data, trained on its own, that scores the text `model` writes.

    Raises:
        UserError: the shards are gone, or hold other data than the model was trained on.
        CorruptData: a shard is not what its manifest promises.
    """
    shards = open_shards(model, split, data)
    task = family_of(model.config).task
    # Each task is imported when it is needed: evaluating images needs nothing of text.
    if task == "classify":
        from dbtrain.inference.accuracy import evaluate_classifier
        from dbtrain.inference.classify import Classifier

        return evaluate_classifier(Classifier(model), shards, progress=progress)
    if task == "generate_images":
        from dbtrain.inference.frechet import evaluate_images
        from dbtrain.inference.sample_images import ImageSampler

        return evaluate_images(ImageSampler(model), shards, progress=progress)
    if task == "generate_text":
        from dbtrain.inference.bits import evaluate_text
        from dbtrain.inference.generate import TextGenerator

        judging = None if judge is None else TextGenerator(judge)
        return evaluate_text(TextGenerator(model), shards, judge=judging, progress=progress)
    from dbtrain.inference.elbo import evaluate_unmasking
    from dbtrain.inference.unmask import TextUnmasker

    return evaluate_unmasking(TextUnmasker(model), shards, progress=progress)


def open_shards(model: AssembledModel, split: Split, data: str | Path | None = None) -> ShardSet:
    """The split's shards, verified, and known to be those of the model. Arguments and errors as those of `evaluate`."""
    facts = model.plan.data
    assert facts is not None
    place = model.config.data
    if data is not None:  # read where the user says, and copied only where it has to be
        place = place.model_copy(update={"path": str(data), "cache": None})
    folder = local_shards(place, facts.sha256)
    if not (folder / MANIFEST_FILE).exists():
        raise UserError(
            "the shards the model was trained on are not there (any more)",
            field="data.path",
            value=str(folder),
            mend="give their folder with --data, or prepare the same data again",
        )
    shards = ShardSet.open(folder, split)
    if shards.manifest.facts().sha256 != facts.sha256:
        raise UserError(
            "the shards are not those the model was trained on",
            field="data.path" if data is None else "--data",
            value=str(folder),
            mend="prepare the same data again, or give its folder with --data",
        )
    shards.verify()
    return shards
