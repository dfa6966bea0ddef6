"""Bits per byte where a token is more than a byte: what counts is the text, not how it is cut."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_families import raw_config
from small_runs import start_run, train_all

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config_file import parse_config
from dbtrain.data.prepare import prepare
from dbtrain.data.shards import ShardSet
from dbtrain.inference.bits import evaluate_text, judged
from dbtrain.inference.elbo import evaluate_unmasking
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.runs import model_of
from dbtrain.inference.unmask import TextUnmasker

LENGTH, VOCAB = 32, 320


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Subwords of short documents with letters of two and three bytes."""
    folder = tmp_path_factory.mktemp("subwords")
    for index in range(40):
        text = f"Der Käse Nummer {index} ist über {index * 7} € teuer, – und größer als groß. " * 4
        (folder / f"{index:02}.txt").write_text(text, encoding="utf-8")
    prepare(str(folder), folder / "shards", length=LENGTH, tokenizer="bpe", vocab_size=VOCAB)
    return folder / "shards"


def _model(family: str, shards: Path, where: Path) -> AssembledModel:
    separator = ShardSet.open(shards, "test").manifest.facts().separator
    raw = raw_config(family, shards, model={"vocab_size": VOCAB, "separator": separator}, training={"steps": 10})
    return model_of(train_all(start_run(parse_config(raw), where, "end_to_end")))


def _spelt(model: TextGenerator | TextUnmasker, tokens: torch.Tensor) -> bytes:
    return b"".join(model.tokenizer.token_bytes[token] for token in tokens.flatten().tolist())


def _held_out(shards: Path) -> tuple[ShardSet, torch.Tensor]:
    opened = ShardSet.open(shards, "test")
    tokens = torch.from_numpy(opened.gather("tokens", np.arange(opened.rows)).astype(np.int64))
    return opened, tokens


def test_bits_per_byte(shards: Path, tmp_path: Path) -> None:
    model, (test, tokens) = _model("causal_lm", shards, tmp_path / "run"), _held_out(shards)
    generator = TextGenerator(model)
    nats = -generator.logits(tokens).log_softmax(dim=-1).gather(2, tokens[..., None])[..., 0].double()
    num_bytes = len(_spelt(generator, tokens))
    assert num_bytes > 1.5 * tokens.numel()
    assert (tokens == generator.tokenizer.separator).any()
    result = evaluate_text(generator, test)
    assert result.rows == len(tokens)
    assert result.value == pytest.approx(float(nats.sum()) / math.log(2) / num_bytes, rel=1e-5)


def test_a_judge_counts_bytes(shards: Path, tmp_path: Path) -> None:
    model, (test, chosen) = _model("causal_lm", shards, tmp_path / "run"), _held_out(shards)
    generator, total, num_bytes = TextGenerator(model), 0.0, 0
    assert len(chosen) <= 24  # all of them are judged
    said = generator.logits(chosen).log_softmax(dim=-1).gather(2, chosen[..., None])[..., 0].double()
    for row, log_probs in zip(chosen, said, strict=True):
        ends = (row[LENGTH // 4 :] == generator.tokenizer.separator).nonzero().flatten().tolist()
        part = slice(LENGTH // 4, LENGTH // 4 + ends[0] + 1 if ends else LENGTH)
        total -= float(log_probs[part].sum()) / math.log(2)
        num_bytes += len(_spelt(generator, row[part]))
    assert judged(generator, generator, test)["real_bits_per_byte"] == pytest.approx(total / num_bytes, rel=1e-5)


def test_bits_per_character(shards: Path, tmp_path: Path) -> None:
    """The same bits over fewer units: characters of the text, however many bytes or tokens they take."""
    model, (test, tokens) = _model("masked_lm", shards, tmp_path / "run"), _held_out(shards)
    unmasker = TextUnmasker(model)
    result = evaluate_unmasking(unmasker, test)
    spelt = _spelt(unmasker, tokens)
    characters = sum(1 for byte in spelt if not 0x80 <= byte < 0xC0)
    assert tokens.numel() < characters < len(spelt)
    # Untrained, all tokens are about equally likely.
    assert result.value * characters / tokens.numel() == pytest.approx(math.log2(VOCAB), rel=0.1)
