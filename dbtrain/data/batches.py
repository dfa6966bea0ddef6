"""From a configuration and the facts of its data to the transform of its batches."""

from __future__ import annotations

from collections.abc import Sequence

from dbtrain.config import RunConfig
from dbtrain.data.fits import refuse_augmentation
from dbtrain.data.transforms import EvalTransform, LatentTransform, TokenTransform, TrainTransform, Transform
from dbtrain.plan import DatasetFacts


def make_transform(
    config: RunConfig,
    facts: DatasetFacts,
    scaling: tuple[Sequence[float], Sequence[float]] | None,
    key: int | None,
) -> Transform:
    """What a loader does to its batches.

    Args:
        config: the run; its `data.augment` applies in training.
        facts: of the data.
        scaling: mean and standard deviation of each channel, of pixels in [0, 1] or of latents as they are; the
            data's own when None. Text has none.
        key: of the random distortions in training; None for evaluation, which distorts nothing.

    Raises:
        UserError: distortions are asked for and the data is not of images.
    """
    mean, std = scaling if scaling is not None else (facts.mean, facts.std)
    if key is not None:
        refuse_augmentation(config.data.augment, facts.kind)
    if facts.kind == "text":
        return TokenTransform()
    if facts.kind == "latent":
        return LatentTransform(mean, std)
    if key is None:
        return EvalTransform(mean, std)
    return TrainTransform(config.data.augment, mean, std, key)
