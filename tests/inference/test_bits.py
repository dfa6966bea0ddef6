from __future__ import annotations

import json
import math
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import torch
from text_models import small_language_model
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import READOUTS
from dbtrain.data.prepare import prepare
from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.chain import read_out
from dbtrain.errors import UserError
from dbtrain.inference import bits
from dbtrain.inference.bits import evaluate_text
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.generate import TextGenerator

LENGTH, ROWS = 32, 40


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of many short documents, so that held-out windows have separators in them."""
    folder = tmp_path_factory.mktemp("lines")
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:20])
    documents = [json.dumps({"text": line}) for line in text.splitlines() if line.strip()]
    (folder / "lines.jsonl").write_text("\n".join(documents), encoding="utf-8")
    prepare(str(folder / "lines.jsonl"), folder / "shards", length=LENGTH)
    return folder / "shards"


@pytest.fixture(scope="module")
def blocks(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    return small_language_model(lines, tmp_path_factory.mktemp("runs") / "blocks")


@pytest.fixture(scope="module")
def baseline(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    return small_language_model(lines, tmp_path_factory.mktemp("runs") / "baseline", "end_to_end")


@pytest.fixture
def held_out(lines: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ShardSet, Tensor]:
    """The held-out split, of which some rows are evaluated, fifteen at a time; and these rows (ROWS, L)."""
    monkeypatch.setattr(bits, "EVALUATED_TOKENS", ROWS * LENGTH + 5)
    monkeypatch.setattr(bits, "BATCH_NUMBERS", 15 * LENGTH * 257 + 1)
    monkeypatch.setattr(bits, "JUDGED_TEXTS", 4)
    shards = ShardSet.open(lines, "test")
    rows = np.arange(ROWS) * shards.rows // ROWS
    assert 256 in shards.gather("tokens", rows)  # the end of a document among them
    return shards, torch.from_numpy(shards.gather("tokens", rows).astype(np.int64))


def _bits(probabilities: Tensor, tokens: Tensor) -> float:
    """-log2 of the true tokens' probabilities, over the bytes: all tokens but separators."""
    total = sum(
        -math.log2(float(row[token]))
        for row, token in zip(probabilities.reshape(-1, 257), tokens.flatten(), strict=True)
    )
    return total / int((tokens != 256).sum())


def test_a_baseline_by_hand(baseline: AssembledModel, held_out: tuple[ShardSet, Tensor]) -> None:
    shards, tokens = held_out
    told: list[tuple[int, int]] = []
    result = evaluate_text(TextGenerator(baseline), shards, progress=lambda done, total: told.append((done, total)))
    expected = _bits(baseline.modules[0](tokens).softmax(dim=-1), tokens)
    assert result.readouts == {"bits_per_byte": pytest.approx(expected, rel=1e-5)}
    assert (result.rows, result.chain, result.alone, result.also) == (ROWS, (), (), {})
    assert (result.metric.name, result.metric.better) == ("bits_per_byte", "lower")
    assert told == [(15, ROWS), (30, ROWS), (ROWS, ROWS)]


@torch.inference_mode()
def test_blocks_by_hand(blocks: AssembledModel, held_out: tuple[ShardSet, Tensor]) -> None:
    shards, tokens = held_out
    generator = TextGenerator(blocks)
    rows = np.arange(ROWS) * shards.rows // ROWS
    result = evaluate_text(generator, shards)
    traces = [generator.trace(generator.contexts(tokens), rows, noise) for noise in range(3)]
    assert set(result.readouts) == set(READOUTS)
    for name, value in result.readouts.items():
        assert value == pytest.approx(_bits(read_out(traces, name), tokens), rel=1e-4), name
    assert result.value == result.readouts["product"]
    for index, point in enumerate(result.chain):
        each = [_bits(trace.log_probs[index].exp(), tokens) for trace in traces]
        assert point["bits_per_byte"] == pytest.approx(sum(each) / 3, rel=1e-4)
        nats = point["bits_per_byte"] * math.log(2) * int((tokens != 256).sum()) / tokens.numel()
        assert point["cross_entropy"] == pytest.approx(nats, rel=1e-6)
        assert (point["block"], point["sigma"]) == (index, blocks.ranges[index].high)
        so_far = (sum(traces[0].log_probs[: index + 1]) / (index + 1)).softmax(dim=-1)
        assert point["so_far"] == pytest.approx(_bits(so_far, tokens), rel=1e-4)
    assert result.chain[-1]["so_far"] == pytest.approx(result.readouts["product"], rel=1e-6)
    noise = generator.start(rows, 0).view(ROWS, LENGTH, -1)
    for index, (point, own) in enumerate(zip(result.alone, blocks.ranges, strict=True)):
        said = blocks.modules[index](tokens, own.high * noise, torch.full((ROWS, 1), own.high)).softmax(dim=-1)
        assert point["bits_per_byte"] == pytest.approx(_bits(said, tokens), rel=1e-4)
    assert result.alone[0]["bits_per_byte"] == pytest.approx(result.readouts["first"], rel=1e-6)


def test_starting_noises_are_of_the_row_and_place(blocks: AssembledModel) -> None:
    generator = TextGenerator(blocks)
    whole = generator.start(np.array([4, 9]), 0)
    assert torch.equal(whole[LENGTH:], generator.start(np.array([9]), 0))
    assert len({tuple(row.tolist()) for row in [*whole, *generator.start(np.array([4, 9]), 1)]}) == 4 * LENGTH
    assert float(whole.std()) == pytest.approx(1.0, abs=0.1)


@torch.inference_mode()
def test_a_judge_by_hand(blocks: AssembledModel, baseline: AssembledModel, held_out: tuple[ShardSet, Tensor]) -> None:
    shards, _ = held_out
    result = evaluate(blocks, judge=baseline)
    assert set(result.also) == {
        "generated_bits_per_byte",
        "real_bits_per_byte",
        "generated_distinct_4grams",
        "real_distinct_4grams",
    }
    rows = torch.from_numpy(shards.gather("tokens", np.arange(4) * shards.rows // 4).astype(np.int64))
    total, num_bytes = 0.0, 0
    for row, said in zip(rows, baseline.modules[0](rows).log_softmax(dim=-1), strict=True):
        for place in range(LENGTH // 4, LENGTH):
            total -= float(said[place, row[place]]) / math.log(2)
            num_bytes += int(row[place] != 256)
            if row[place] == 256:
                break
    assert result.also["real_bits_per_byte"] == pytest.approx(total / num_bytes, rel=1e-5)
    assert evaluate(blocks, judge=baseline) == result


def test_a_judge_prefers_what_it_writes_itself_to_noise(baseline: AssembledModel, lines: Path) -> None:
    judge, shards = TextGenerator(baseline), ShardSet.open(lines, "test")
    noise = [np.random.default_rng(index).integers(0, 256, 20) for index in range(8)]
    prompts = [shards.gather("tokens", np.array([index]))[0, :8].astype(np.int64) for index in range(8)]
    own = bits.judged(judge, judge, shards)
    assert own["generated_bits_per_byte"] < bits._judge(judge, prompts, noise)


def test_only_a_baseline_of_the_same_data_may_judge(
    blocks: AssembledModel, baseline: AssembledModel, lines: Path
) -> None:
    with pytest.raises(UserError, match="--judge: is made of blocks"):
        evaluate(baseline, judge=blocks)
    facts = baseline.plan.data
    assert facts is not None
    other = TextGenerator(baseline)
    plan = baseline.plan.model_copy(update={"data": facts.model_copy(update={"sha256": "0" * 64})})
    object.__setattr__(other, "model", type(baseline)(**{**vars(baseline), "plan": plan}))
    with pytest.raises(UserError, match="--judge: was trained on other data"):
        evaluate_text(TextGenerator(blocks), ShardSet.open(lines, "test"), judge=other)


def test_repetition_shows() -> None:
    texts = [np.array([1, 2, 3, 4, 1, 2, 3, 4]), np.array([9, 9, 9, 9, 9]), np.array([5, 6])]
    assert bits._distinct(texts, 4) == pytest.approx((4 + 1) / (5 + 2))
    assert bits._distinct([np.array([1])], 4) == 1.0


def test_learning_shows_in_bits(lines: Path, tmp_path: Path, baseline: AssembledModel) -> None:
    """More training, fewer bits; chance is at 8."""
    shards = ShardSet.open(lines, "test")
    longer = {"training": {"steps": 60}, "optimiser": {"lr": 5e-3}}
    model = small_language_model(lines, tmp_path / "run", "end_to_end", **longer)
    assert (
        evaluate_text(TextGenerator(model), shards).value < evaluate_text(TextGenerator(baseline), shards).value < 8.1
    )
