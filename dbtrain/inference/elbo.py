"""Bits per character of a masked language model: the evidence bound of held-out text, range by range.

The bound's integral over mask levels (`dbtrain.diffusion.masking`) is cut at the blocks' ranges; each range is
estimated by a constant number of random masks a row. Levels and masks are functions of the row's number and the range
alone, so that a run, its baseline, and runs of other seeds are compared on the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.masking import MaskSchedule, random_mask
from dbtrain.inference.evaluation import BITS_PER_CHARACTER, Evaluation, Point, Progress
from dbtrain.inference.unmask import TextUnmasker
from dbtrain.models.masked_lm import MaskedLM
from dbtrain.plan import NoiseRange
from dbtrain.randomness import derive_key, keyed_uniform

DRAWS = 4
"""Random masks of each row in each range."""
EVALUATED_ROWS = 2048
"""Of a larger split so many rows are used, spread evenly over it."""

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def evaluate_unmasking(
    unmasker: TextUnmasker, shards: ShardSet, *, batch_size: int = 64, progress: Progress | None = None
) -> Evaluation:
    """Bits per character on the rows of `shards`: the bound on -log2 p over the number of characters.

    `chain` has a block's term each, `level` the top of its range; the terms add up to the metric. For a baseline, which
    has no blocks, `also` has the terms of the same ranges. A character begins at each byte that is not a continuation
    byte of UTF-8; separators are paid for and count as none.
    """
    metric = BITS_PER_CHARACTER
    total = min(shards.rows, EVALUATED_ROWS)
    rows = np.arange(total, dtype=np.int64) * shards.rows // total
    characters_v = torch.tensor([_characters(token) for token in unmasker.tokenizer.token_bytes])
    nats = [0.0] * len(unmasker.ranges)
    characters = 0
    for first in range(0, total, batch_size):
        chosen = rows[first : first + batch_size]
        tokens_nl = torch.from_numpy(shards.gather("tokens", chosen).astype(np.int64))
        characters += int(characters_v[tokens_nl].sum())
        tokens_nl = tokens_nl.to(unmasker.model.device)
        for index, own in enumerate(unmasker.ranges):
            nats[index] += float(range_nats(unmasker.network(index), tokens_nl, chosen, own, index).sum())
        if progress is not None:
            progress(first + len(chosen), total)
    bits = [value / math.log(2.0) / characters for value in nats]
    name, whole = metric.name, unmasker.model.end_to_end
    points: list[Point] = [
        {"block": index, "level": own.high, name: bits[index]} for index, own in enumerate(unmasker.ranges)
    ]
    return Evaluation(
        kind=unmasker.model.plan.kind,
        split=shards.split,
        rows=total,
        metric=metric,
        readouts={name: sum(bits)},
        predict=name,
        chain=() if whole else tuple(points),
        also={f"range {index}: {name}": value for index, value in enumerate(bits)} if whole else {},
    )


@torch.inference_mode()
def range_nats(
    network: MaskedLM, tokens_nl: Tensor, rows: npt.NDArray[np.int64], within: NoiseRange, index: int
) -> Tensor:
    """Each row's evidence bound over the mask levels `within`, (N,) nats, float64: an unbiased estimate.

    Args:
        rows: the rows' numbers; with `index`, the range's, they key levels and masks.
    """
    total_n = torch.zeros(len(rows), dtype=torch.float64, device=tokens_nl.device)
    for level_n, masked_nl in _draws(network.schedule, rows, within, index, tokens_nl.shape[1]):
        level_n, masked_nl = level_n.to(tokens_nl.device), masked_nl.to(tokens_nl.device)
        total_n += network.bound(tokens_nl, masked_nl, level_n).double()
    return (within.high - within.low) * total_n / DRAWS


def _draws(
    schedule: MaskSchedule, rows: npt.NDArray[np.int64], within: NoiseRange, index: int, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`DRAWS` times levels (N,), float32, and masks (N, L).

    A row's levels lie one in each of `DRAWS` equal parts of the range. Where in its part follows a golden-ratio
    sequence over the rows with a random start, which fills the range more evenly than independent numbers.
    """
    key = derive_key(0, "elbo", index)
    shift = keyed_uniform(key, np.array([-1], dtype=np.int64), 1)[0, 0]
    place_n = np.modf(shift + rows * _GOLDEN)[0]
    for draw in range(DRAWS):
        level_n = within.low + (within.high - within.low) * torch.from_numpy((draw + place_n) / DRAWS)
        numbers = torch.from_numpy(keyed_uniform(derive_key(0, "elbo", index, draw), rows, 1 + length))
        yield level_n.float(), random_mask(schedule.masked(level_n), numbers[:, 0], numbers[:, 1:])


def _characters(token: bytes) -> int:
    """Characters that begin in a token."""
    return sum(byte & 0xC0 != 0x80 for byte in token)
