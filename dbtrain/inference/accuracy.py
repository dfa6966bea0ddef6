"""Accuracy of an assembled classifier: every read-out and its calibration, every step of the chain, every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbtrain.config import READOUTS
from dbtrain.data.batches import make_transform
from dbtrain.data.loader import iterate_split
from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.chain import pools_so_far, read_out
from dbtrain.inference.calibration import Calibration
from dbtrain.inference.classify import Classifier
from dbtrain.inference.evaluation import ACCURACY, SO_FAR, Evaluation, Point, Progress
from dbtrain.models import family_of
from dbtrain.models.family import relays
from dbtrain.plan import NoiseRange

WITHOUT = ("last", "product")
"""Read-outs of the chain without one of its blocks."""


class _Tally:
    """Running sums of hits and cross-entropy by name."""

    def __init__(self) -> None:
        self._hits: dict[str, float] = {}
        self._nats: dict[str, float] = {}

    def add(self, name: str, probabilities: Tensor, labels: Tensor, share: float = 1.0) -> None:
        """Take in a batch; `share` weighs it where several noises are averaged."""
        hits = (probabilities.argmax(dim=-1) == labels).sum()
        nats = -probabilities.gather(1, labels[:, None]).clamp_min(1e-30).log().sum()
        self._hits[name] = self._hits.get(name, 0.0) + share * float(hits)
        self._nats[name] = self._nats.get(name, 0.0) + share * float(nats)

    def means(self, name: str, rows: int) -> tuple[float, float]:
        """Accuracy and mean cross-entropy."""
        return self._hits[name] / rows, self._nats[name] / rows


def evaluate_classifier(
    classifier: Classifier, shards: ShardSet, *, batch_size: int = 500, progress: Progress | None = None
) -> Evaluation:
    """Accuracy on the rows of `shards`. `alone` is a block from pure noise at the top of its own range: what it knows
    of the image when nobody walked before it; `without` is the chain from the first starting noise without a block."""
    model = classifier.model
    facts = model.plan.data
    assert facts is not None
    transform = make_transform(model.config, facts, family_of(model.config).scaling(model.config, facts), None)
    relayed = relays(model.config, model.plan.kind)
    names = ("accuracy",) if model.end_to_end else READOUTS
    calibration = {name: Calibration() for name in names}
    tally, seen = _Tally(), 0
    steps: list[tuple[int, float]] = []
    with torch.inference_mode():
        for batch in iterate_split(shards, transform, batch_size, model.device):
            images, labels = batch["image"], batch["label"]
            positions = np.arange(seen, seen + len(labels), dtype=np.int64)
            if model.end_to_end:
                answers = {"accuracy": classifier.logits(images).softmax(dim=-1)}
            else:
                features = classifier.features(images)
                answers, steps = _evaluate_chain(classifier, features, labels, positions, tally)
                _evaluate_alone(classifier, features, labels, positions, tally)
                for index in _spared(classifier):
                    # A relayed block makes something else of the image when one before it is missing.
                    left = classifier.features(images, skip={index}) if relayed else features
                    trace = classifier.walk(left, positions, 0, skip={index})
                    for name in WITHOUT:
                        tally.add(f"without {index} {name}", read_out([trace], name), labels)
            for name, probabilities in answers.items():
                tally.add(name, probabilities, labels)
                calibration[name].add(probabilities, labels)
            seen += len(labels)
            if progress is not None:
                progress(seen, shards.rows)
    return Evaluation(
        kind=model.plan.kind,
        split=shards.split,
        rows=seen,
        metric=ACCURACY,
        readouts={name: tally.means(name, seen)[0] for name in names},
        calibration={name: calibration[name].error(seen) for name in names},
        predict="accuracy" if model.end_to_end else model.config.chain.readout,
        chain=tuple(
            {
                **_point(block, sigma, tally.means(f"step {index}", seen)),
                SO_FAR: tally.means(f"{SO_FAR} {index}", seen)[0],
            }
            for index, (block, sigma) in enumerate(steps)
        ),
        alone=tuple(_point(index, own.high, tally.means(f"alone {index}", seen)) for index, own in _loners(classifier)),
        without=tuple(
            {"block": index, **{name: tally.means(f"without {index} {name}", seen)[0] for name in WITHOUT}}
            for index in _spared(classifier)
        ),
    )


def _point(block: int, sigma: float, means: tuple[float, float]) -> Point:
    return {"block": block, "sigma": sigma, "accuracy": means[0], "cross_entropy": means[1]}


def _evaluate_chain(
    classifier: Classifier,
    features: Mapping[int, Tensor],
    labels: Tensor,
    positions: np.ndarray[Any, np.dtype[np.int64]],
    tally: _Tally,
) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    """Count every step for one batch; returns the read-outs' probabilities and the chain's (block, sigma) steps."""
    noises = classifier.config.chain.start_noises
    traces = [classifier.walk(features, positions, noise) for noise in range(noises)]
    for trace in traces:
        for index, log_probs in enumerate(trace.log_probs):
            tally.add(f"step {index}", log_probs.exp(), labels, share=1 / noises)
    for index, log_probs in enumerate(pools_so_far(traces[0].log_probs)):
        tally.add(f"{SO_FAR} {index}", log_probs.exp(), labels)
    return {name: read_out(traces, name) for name in READOUTS}, list(
        zip(traces[0].blocks, traces[0].sigmas, strict=True)
    )


def _evaluate_alone(
    classifier: Classifier,
    features: Mapping[int, Tensor],
    labels: Tensor,
    positions: np.ndarray[Any, np.dtype[np.int64]],
    tally: _Tally,
) -> None:
    noise = classifier.start(positions, 0)
    for index, own in _loners(classifier):
        said = classifier.log_probs(features[index], index, own.high * noise, own.high)
        tally.add(f"alone {index}", said.exp(), labels)


def _loners(classifier: Classifier) -> list[tuple[int, NoiseRange]]:
    """Blocks that have an answer of their own: what a relayed block adds to the belief of others is none."""
    model = classifier.model
    return [] if relays(model.config, model.plan.kind) else list(enumerate(model.ranges))


def _spared(classifier: Classifier) -> range:
    """The blocks without which something is left of the chain."""
    count = len(classifier.model.ranges)
    return range(count if count > 1 else 0)
