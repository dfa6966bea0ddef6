"""Accuracy of an assembled classifier: every read-out, every step of the chain, every block alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbtrain.config import READOUTS
from dbtrain.data.loader import iterate_split
from dbtrain.data.manifest import MANIFEST_FILE, Split
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import EvalTransform
from dbtrain.diffusion.chain import read_out
from dbtrain.errors import UserError
from dbtrain.inference.classify import Classifier
from dbtrain.plan import Kind


@dataclass(frozen=True)
class Evaluation:
    """Accuracies are fractions of the split's rows, in [0, 1]."""

    kind: Kind
    split: str
    rows: int
    readouts: dict[str, float]
    """By read-out name; `accuracy` alone for an end-to-end network."""
    predict: str
    """The read-out that `predict` uses."""
    chain: tuple[dict[str, float], ...]
    """One entry a step of the chain: block, sigma, and accuracy and cross-entropy (nats) of what was said there, mean
    over the starting noises."""
    alone: tuple[dict[str, float], ...]
    """One entry a block: accuracy and cross-entropy with pure noise at the top of the block's own range, that is,
    what the block knows of the image when nobody walked before it."""

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Evaluation:
        """What `as_json` gave, after a round trip through JSON. Raises TypeError or KeyError if it is not that."""
        return cls(**{**plain, "chain": tuple(plain["chain"]), "alone": tuple(plain["alone"])})

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


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


def evaluate(
    classifier: Classifier,
    split: Split = "test",
    *,
    data: str | Path | None = None,
    batch_size: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate on a split of the data the model was trained with.

    Args:
        data: the folder of the shards, where they are not (any more) where the run's configuration says.

    Raises:
        UserError: the shards are gone, or hold other data than the model was trained on.
        CorruptData: a shard is not what its manifest promises.
    """
    model = classifier.model
    facts = model.plan.data
    assert facts is not None
    folder = model.config.data.shards if data is None else Path(data).expanduser().absolute()
    shards = _open_shards(folder, split)
    if shards.manifest.facts().sha256 != facts.sha256:
        raise UserError(
            "the shards are not those the model was trained on",
            field="data.path" if data is None else "--data",
            value=str(folder),
            mend="prepare the same data again, or give its folder with --data",
        )
    shards.verify()
    tally, steps, seen = _Tally(), [], 0
    with torch.inference_mode():
        for batch in iterate_split(shards, EvalTransform(facts.mean, facts.std), batch_size, model.device):
            images, labels = batch["image"], batch["label"]
            positions = np.arange(seen, seen + len(labels), dtype=np.int64)
            if model.codebook is None:
                tally.add("accuracy", classifier.logits(images).softmax(dim=-1), labels)
            else:
                steps = _evaluate_chain(classifier, images, labels, positions, tally)
                _evaluate_alone(classifier, images, labels, positions, tally)
            seen += len(labels)
            if progress is not None:
                progress(seen, shards.rows)
    end_to_end = model.codebook is None
    names = ("accuracy",) if end_to_end else READOUTS
    return Evaluation(
        kind=model.plan.kind,
        split=split,
        rows=seen,
        readouts={name: tally.means(name, seen)[0] for name in names},
        predict="accuracy" if end_to_end else model.config.chain.readout,
        chain=tuple(
            _point(block, sigma, tally.means(f"step {index}", seen)) for index, (block, sigma) in enumerate(steps)
        ),
        alone=tuple(
            _point(index, own.high, tally.means(f"alone {index}", seen)) for index, own in enumerate(classifier.ranges)
        ),
    )


def _open_shards(folder: Path, split: Split) -> ShardSet:
    if not (folder / MANIFEST_FILE).exists():
        raise UserError(
            "the shards the model was trained on are not there (any more)",
            field="data.path",
            value=str(folder),
            mend="give their folder with --data, or prepare the same data again",
        )
    return ShardSet.open(folder, split)


def _point(block: int, sigma: float, means: tuple[float, float]) -> dict[str, float]:
    return {"block": block, "sigma": sigma, "accuracy": means[0], "cross_entropy": means[1]}


def _evaluate_chain(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    positions: np.ndarray[Any, np.dtype[np.int64]],
    tally: _Tally,
) -> list[tuple[int, float]]:
    """Count every read-out and step for one batch; returns the chain's (block, sigma) steps."""
    noises = classifier.config.chain.start_noises
    traces = [classifier.trace(images, positions, noise) for noise in range(noises)]
    for name in READOUTS:
        tally.add(name, read_out(traces, name), labels)
    for trace in traces:
        for index, log_probs in enumerate(trace.log_probs):
            tally.add(f"step {index}", log_probs.exp(), labels, share=1 / noises)
    return list(zip(traces[0].blocks, traces[0].sigmas, strict=True))


def _evaluate_alone(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    positions: np.ndarray[Any, np.dtype[np.int64]],
    tally: _Tally,
) -> None:
    noise = classifier.start(positions, 0)
    for index, own in enumerate(classifier.ranges):
        said = classifier.log_probs(images, index, own.high * noise, own.high)
        tally.add(f"alone {index}", said.exp(), labels)
