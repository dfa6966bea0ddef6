"""How well a generator's images are distributed: Frechet distance and accuracy in the features of a small classifier.

The Frechet distance of two Gaussians fitted to features is what Heusel et al. 2017 proposed with an Inception network;
with a classifier trained on the data at hand it is a distance of the same kind, and not the FID of papers. For that,
`dbtrain sample` writes images that evaluators with Inception weights take.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dbtrain.data.batches import make_transform
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import Transform
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.diffusion.precondition import weighted_errors
from dbtrain.diffusion.sampler import Solver, network_calls
from dbtrain.inference.evaluation import FRECHET_DISTANCE, Evaluation, Progress
from dbtrain.inference.feature_classifier import FeatureClassifier, shuffled_rows, train_classifier
from dbtrain.inference.sample_images import ImageSampler
from dbtrain.models import family_of
from dbtrain.randomness import derive_key, generator

SAMPLES = 1000
"""Images that are generated for one distance; the fewer they are, the higher it comes out."""
LOSS_ROWS = 2000
"""At most as many rows tell the blocks' losses."""
CHEAP_STEPS = 6
_BATCH = 500


def evaluate_images(
    sampler: ImageSampler, shards: ShardSet, *, samples: int = SAMPLES, progress: Progress | None = None
) -> Evaluation:
    """Compare `samples` generated images with all rows of `shards`, for several ways to walk from noise to images.

    The labels asked for are those of the rows. `readouts` are named solver_steps: the configured walk,
    the other solver at as many network calls, and a cheap one. `also` holds, beside the distance of training rows to
    these rows (what a perfect generator would reach) and the classifier's accuracies, each block's mean training loss
    on its own range of noise, or the baseline's on the same ranges.
    """
    model = sampler.model
    facts = model.plan.data
    assert facts is not None
    transform = make_transform(model.config, facts, family_of(model.config).scaling(model.config, facts), None)
    train = ShardSet.open(shards.folder, "train")
    classifier = train_classifier(train, transform, model.device)
    real, labels = _real(classifier, shards, transform, model.device, shards.rows)
    floor, _ = _real(classifier, train, transform, model.device, min(samples, train.rows))
    also = {"frechet_distance of training rows": frechet_distance(floor.features, real.features)}
    labelled = len(facts.class_names) > 1
    if labelled:
        also["accuracy on real rows"] = real.accuracy(labels)
    conditional = sampler.num_classes is not None
    asked = sampler.labels_for(samples, labels.tolist() if conditional else None)

    configured = (model.config.chain.solver, sampler.steps)
    walks = list(dict.fromkeys([configured, _equal_calls(*configured), ("heun", CHEAP_STEPS)]))
    readouts = {}
    for number, (solver, steps) in enumerate(walks):

        def tell(done: int, count: int, number: int = number) -> None:
            if progress is not None:
                progress(number * count + done, len(walks) * count)

        drawn = sampler.sample(
            samples, None if asked is None else asked.tolist(), steps=steps, solver=solver, progress=tell
        )
        image = torch.from_numpy(drawn if sampler.latents else drawn.transpose(0, 3, 1, 2).copy())
        fake = _features(classifier, image, transform, model.device)
        name = f"{solver}_{steps}"
        readouts[name] = frechet_distance(fake.features, real.features)
        if asked is not None and labelled:
            also[f"accuracy of {name}"] = fake.accuracy(asked)
    return Evaluation(
        kind=model.plan.kind,
        split=shards.split,
        rows=shards.rows,
        metric=FRECHET_DISTANCE,
        readouts=readouts,
        predict=f"{configured[0]}_{configured[1]}",
        also=also | block_losses(sampler, shards, transform),
    )


def frechet_distance(a_nd: Tensor, b_nd: Tensor) -> float:
    """Of Gaussians fitted to the rows of two sets: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2).

    The root's trace is the sum of the roots of eigenvalues of a symmetric matrix: covariances may be singular, as they
    are where there are fewer rows than features.
    """
    a, b = a_nd.double().cpu(), b_nd.double().cpu()
    c_a, c_b = torch.cov(a.T, correction=0), torch.cov(b.T, correction=0)
    values, vectors = torch.linalg.eigh(c_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp_min(0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return max(float(means + c_a.trace() + c_b.trace() - 2 * cross), 0.0)


@torch.inference_mode()
def block_losses(sampler: ImageSampler, shards: ShardSet, transform: Transform) -> dict[str, float]:
    """Mean weighted error on each block's own range, by "block k: loss", at noise that is the same for every model."""
    model, noise = sampler.model, sampler.config.noise
    distribution = NoiseDistribution.from_config(noise)
    rows = min(shards.rows, LOSS_ROWS)
    losses = {}
    for index, piece in enumerate(family_of(sampler.config).cut(sampler.config)):
        assert piece.noise is not None
        module = model.modules[0 if model.end_to_end else index]
        source = generator(derive_key(0, "evaluation noise", index))
        sigma, total, seen = distribution.sample(piece.noise, rows, source), 0.0, 0
        for batch in shuffled_rows(shards, transform, rows, model.device):
            image = batch["image"]
            eps = torch.randn(image.shape, generator=source).to(image)
            levels = sigma[seen : seen + len(image)].to(image)
            label = None if sampler.num_classes is None else batch["label"]
            estimate = module(image + levels.view(-1, 1, 1, 1) * eps, levels, label)
            errors = weighted_errors(noise.weight, estimate, image, levels, noise.sigma_data)
            total += float(errors.sum(dtype=torch.float64))
            seen += len(image)
        losses[f"block {index}: loss"] = total / rows
    return losses


class _Seen:
    """What the classifier makes of some images."""

    def __init__(self, features: Tensor, answers: Tensor):
        self.features = features
        """(N, FEATURES)"""
        self._answers = answers

    def accuracy(self, labels: Tensor) -> float:
        """Part of the images that it takes for what they should be."""
        return float((self._answers == labels).double().mean())


@torch.inference_mode()
def _features(classifier: FeatureClassifier, image: Tensor, transform: Transform, device: torch.device) -> _Seen:
    """Of images as the shards hold them, (N, C, H, W)."""
    said = [
        classifier(transform({"image": part.to(device)}, np.arange(len(part), dtype=np.int64))["image"])
        for part in torch.split(image, _BATCH)
    ]
    return _seen(said)


@torch.inference_mode()
def _real(
    classifier: FeatureClassifier, shards: ShardSet, transform: Transform, device: torch.device, rows: int
) -> tuple[_Seen, Tensor]:
    """Of `rows` rows of a split, with their labels."""
    said, labels = [], []
    for batch in shuffled_rows(shards, transform, rows, device):
        said.append(classifier(batch["image"]))
        labels.append(batch["label"].cpu())
    return _seen(said), torch.cat(labels)


def _seen(said: list[tuple[Tensor, Tensor]]) -> _Seen:
    return _Seen(
        torch.cat([features.cpu() for features, _ in said]),
        torch.cat([logits.argmax(dim=-1).cpu() for _, logits in said]),
    )


def _equal_calls(solver: Solver, steps: int) -> tuple[Solver, int]:
    """The other solver with as many network calls, as near as may be."""
    calls = network_calls(solver, steps)
    return ("heun", (calls + 1) // 2) if solver == "euler" else ("euler", calls)
