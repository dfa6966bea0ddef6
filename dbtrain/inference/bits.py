"""Bits per byte of an assembled language model, for every read-out, step and block, and of the text that it writes.

Held-out rows are read with the true tokens before each token (teacher forcing), all tokens of a row at once. A token's
bits count whatever it stands for; a separator stands for no byte, so it costs bits and adds none to what they are
divided by. Rows and starting noises are the same for every run of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dbtrain.config import READOUTS
from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.chain import ChainTrace, log_read_out, pools_so_far
from dbtrain.errors import UserError
from dbtrain.inference.decoding import Decoding
from dbtrain.inference.evaluation import BITS_PER_BYTE, SO_FAR, Evaluation, Point, Progress
from dbtrain.inference.generate import Ids, TextGenerator
from dbtrain.randomness import derive_key

EVALUATED_TOKENS = 2**15
"""Of a larger split so many tokens are used, in rows spread evenly over it."""
JUDGED_TEXTS = 24
"""Held-out prompts that a judged model goes on from."""
ITERATIONS = (1, 2, 4, 8, 16)
"""How often models are iterated that leave it to inference."""
BATCH_NUMBERS = 2**20
"""Logits in one batch of rows, about: several distributions over the vocabulary are held for every token."""


class _Tally:
    """Sums of nats by name, over tokens."""

    def __init__(self) -> None:
        self.nats: dict[str, float] = {}

    def add(self, name: str, log_probs_t: Tensor, share: float = 1.0) -> None:
        """Take in log-probabilities (T,) of true tokens; `share` weighs them where several noises are averaged."""
        self.nats[name] = self.nats.get(name, 0.0) - share * float(log_probs_t.double().sum())


def evaluate_text(
    generator: TextGenerator,
    shards: ShardSet,
    *,
    judge: TextGenerator | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Bits per byte on the rows of `shards`. `first` is what the first block says at sigma_max, knowing only the text.

    `chain` has what each step says, the mean over starting noises, and what the product of all steps so far says from
    the first of them; `alone` a block from pure noise at the top of its
    own range. With a judge, `also` has what the judge thinks of continuations of held-out prompts; of a model that is
    free to iterate, what it says after K iterations, from the first starting noise.

    Args:
        judge: an end-to-end model of the same data.

    Raises:
        UserError: the judge is something else.
    """
    if judge is not None:
        _check_judge(generator, judge)
    model, tally = generator.model, _Tally()
    rows = _rows(shards, EVALUATED_TOKENS // generator.length)
    sizes = _token_sizes(generator)
    steps: list[tuple[int, float]] = []
    free = [count for count in ITERATIONS if model.modules[0].iterates and count >= len(model.modules)]
    tokens = num_bytes = 0
    batch = max(1, BATCH_NUMBERS // (generator.length * len(sizes)))
    for first in range(0, len(rows), batch):
        chosen = rows[first : first + batch]
        tokens_nl = _gather(generator, shards, chosen)
        tokens += tokens_nl.numel()
        num_bytes += int(sizes[tokens_nl.cpu()].sum())
        contexts = [] if model.end_to_end else generator.contexts(tokens_nl)
        if model.end_to_end:
            tally.add(BITS_PER_BYTE.name, _true(generator.logits(tokens_nl).log_softmax(dim=-1), tokens_nl))
        else:
            steps = _add_chain(generator, contexts, tokens_nl, chosen, tally)
            _add_alone(generator, contexts, tokens_nl, chosen, tally)
        for count in free:
            tally.add(f"K={count}", _iterated(generator, contexts, tokens_nl, chosen, count))
        if progress is not None:
            progress(first + len(chosen), len(rows))

    def bits(name: str) -> float:
        return tally.nats[name] / math.log(2.0) / num_bytes

    def point(block: int, sigma: float, name: str) -> Point:
        return {
            "block": block,
            "sigma": sigma,
            BITS_PER_BYTE.name: bits(name),
            "cross_entropy": tally.nats[name] / tokens,
        }

    names = (BITS_PER_BYTE.name,) if model.end_to_end else READOUTS
    return Evaluation(
        kind=model.plan.kind,
        split=shards.split,
        rows=len(rows),
        metric=BITS_PER_BYTE,
        readouts={name: bits(name) for name in names},
        predict=BITS_PER_BYTE.name if model.end_to_end else model.config.chain.readout,
        chain=tuple(
            {**point(block, sigma, f"step {index}"), SO_FAR: bits(f"{SO_FAR} {index}")}
            for index, (block, sigma) in enumerate(steps)
        ),
        alone=tuple(point(index, own.high, f"alone {index}") for index, own in enumerate(model.ranges)),
        also={
            **{f"K={count}: {BITS_PER_BYTE.name}": bits(f"K={count}") for count in free},
            **({} if judge is None else judged(generator, judge, shards)),
        },
    )


def judged(
    generator: TextGenerator, judge: TextGenerator, shards: ShardSet, texts: int | None = None
) -> dict[str, float]:
    """The judge's bits per byte of what `generator` writes after held-out prompts, and of what stands there.

    `texts` windows of the split, or as many as evaluations take. Both go on from the first quarter of a row to its end,
    or to the end of the document. A model that repeats itself may please the judge: the part of different runs of four
    tokens, among all of them, tells.
    """
    tokens_nl = _gather(judge, shards, _rows(shards, JUDGED_TEXTS if texts is None else texts)).cpu().numpy()
    asked = max(1, judge.length // 4)
    keys = [derive_key(0, "judged", index) for index in range(len(tokens_nl))]
    room = [judge.length - asked] * len(tokens_nl)
    prompts = [row[:asked] for row in tokens_nl]
    written = generator.continue_ids(prompts, room, keys, Decoding())
    real = [_to_the_end(row[asked:], judge.tokenizer.separator) for row in tokens_nl]
    return {
        "generated_bits_per_byte": _judge(judge, prompts, written),
        "real_bits_per_byte": _judge(judge, prompts, real),
        "generated_distinct_4grams": _distinct(written, 4),
        "real_distinct_4grams": _distinct(real, 4),
    }


def _check_judge(generator: TextGenerator, judge: TextGenerator) -> None:
    facts, theirs = generator.model.plan.data, judge.model.plan.data
    assert facts is not None
    assert theirs is not None
    if not judge.model.end_to_end:
        raise UserError("is made of blocks; a judge is trained end to end", field="--judge", mend="make a baseline")
    if facts.sha256 != theirs.sha256:
        mend = "train one on the same shards"
        raise UserError("was trained on other data than the model it is to judge", field="--judge", mend=mend)


def _rows(shards: ShardSet, most: int) -> Ids:
    total = max(1, min(shards.rows, most))
    return np.arange(total, dtype=np.int64) * shards.rows // total


def _gather(generator: TextGenerator, shards: ShardSet, rows: Ids) -> Tensor:
    """Tokens (N, L) of rows."""
    return torch.from_numpy(shards.gather("tokens", rows).astype(np.int64)).to(generator.model.device)


def _token_sizes(generator: TextGenerator) -> Tensor:
    """Bytes that each token id stands for, (V,)."""
    return torch.tensor([len(token) for token in generator.tokenizer.token_bytes])


def _true(log_probs: Tensor, tokens_nl: Tensor) -> Tensor:
    """Log-probability of each true token, (N * L,), out of (N * L or N, L; V).

    A model that is sure of something else gives a token less than the least float32; its logarithm is exact.
    """
    return log_probs.reshape(tokens_nl.numel(), -1).gather(1, tokens_nl.reshape(-1, 1))[:, 0]


def _add_chain(
    generator: TextGenerator, contexts: Sequence[Any], tokens_nl: Tensor, rows: Ids, tally: _Tally
) -> list[tuple[int, float]]:
    """Every read-out and step for one batch; returns the chain's (block, sigma) steps."""
    noises = generator.config.chain.start_noises
    trace: ChainTrace | None = None
    walks: dict[str, list[Tensor]] = {name: [] for name in READOUTS}
    for noise in range(noises):
        trace = generator.trace(contexts, rows, noise)
        for index, log_probs in enumerate(pools_so_far(trace.log_probs if noise == 0 else ())):
            tally.add(f"{SO_FAR} {index}", _true(log_probs, tokens_nl))
        for index, log_probs in enumerate(trace.log_probs):
            tally.add(f"step {index}", _true(log_probs, tokens_nl), share=1 / noises)
        for name in READOUTS:
            base = name.removesuffix("_mean")
            # One walk at a time: the mean of the true token's probability is that of the mean distribution.
            if name != base or noise == 0:
                walks[name].append(_true(log_read_out(trace, base), tokens_nl).double())
    for name, said in walks.items():
        tally.add(name, torch.stack(said).logsumexp(dim=0) - math.log(len(said)))
    assert trace is not None
    return list(zip(trace.blocks, trace.sigmas, strict=True))


def _iterated(generator: TextGenerator, contexts: Sequence[Any], tokens_nl: Tensor, rows: Ids, count: int) -> Tensor:
    """Log-probability of each true token, (N * L,), after `count` iterations."""
    if generator.model.end_to_end:
        return _true(generator.logits(tokens_nl, count).log_softmax(dim=-1), tokens_nl)
    return _true(generator.trace(contexts, rows, 0, count).log_probs[-1], tokens_nl)


def _add_alone(generator: TextGenerator, contexts: Sequence[Any], tokens_nl: Tensor, rows: Ids, tally: _Tally) -> None:
    noise = generator.start(rows, 0)
    for index, own in enumerate(generator.model.ranges):
        said = generator.log_probs(contexts, index, own.high * noise, own.high)
        tally.add(f"alone {index}", _true(said, tokens_nl))


def _to_the_end(ids: Ids, separator: int) -> Ids:
    """Up to the end of the document, its separator included."""
    ends = np.flatnonzero(ids == separator)
    return ids[: ends[0] + 1] if len(ends) else ids


def _judge(judge: TextGenerator, prompts: Sequence[Ids], texts: Sequence[Ids]) -> float:
    """Bits per byte of texts after their prompts."""
    sizes, nats, num_bytes = _token_sizes(judge), 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        row = np.zeros((1, judge.length), dtype=np.int64)
        row[0, : len(prompt) + len(text)] = np.concatenate([prompt, text])
        tokens_nl = torch.from_numpy(row).to(judge.model.device)
        log_probs = _true(judge.logits(tokens_nl).log_softmax(dim=-1), tokens_nl)
        nats -= float(log_probs[len(prompt) : len(prompt) + len(text)].double().sum())
        num_bytes += int(sizes[torch.from_numpy(text)].sum())
    # A model that ends every text at once has written no byte, and paid for the ends.
    return nats / math.log(2.0) / max(1, num_bytes)


def _distinct(texts: Sequence[Ids], n: int) -> float:
    """Part of the runs of n tokens that are different from each other; 1 where there is none."""
    runs = [tuple(text[first : first + n].tolist()) for text in texts for first in range(len(text) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0
