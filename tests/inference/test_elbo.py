from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from masked_lm_runs import LENGTH, SECTIONS, trained_model

from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.data.prepare import prepare
from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.masking import MaskSchedule, partition_levels
from dbtrain.inference import elbo
from dbtrain.inference.elbo import evaluate_unmasking, range_nats
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.evaluation import Evaluation
from dbtrain.inference.unmask import TextUnmasker
from dbtrain.models.masked_lm import MaskedLM
from dbtrain.plan import NoiseRange

WHOLE = NoiseRange(low=0.0, high=1.0)


@pytest.fixture(scope="module")
def config(family_config: Callable[..., RunConfig]) -> RunConfig:
    return family_config("masked_lm", **SECTIONS)


@pytest.fixture(scope="module")
def shards(config: RunConfig) -> ShardSet:
    return ShardSet.open(config.data.shards, "test")


@pytest.fixture(scope="module")
def blocks(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> TextUnmasker:
    return TextUnmasker(trained_model(config, tmp_path_factory.mktemp("runs") / "blocks"))


@pytest.fixture(scope="module")
def baseline(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> TextUnmasker:
    return TextUnmasker(trained_model(config, tmp_path_factory.mktemp("runs") / "whole", "end_to_end"))


def _fixed(kind: str, *, blind: bool = False) -> MaskedLM:
    """A small model with random answers; `blind` ones say the same of every row."""
    torch.manual_seed(0)
    module = MaskedLM(_small_model(kind), 1, WHOLE).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if blind:
            module.head.weight.zero_()
    return module


def _small_model(kind: str) -> RunConfig:
    model = {"family": "masked_lm", "length": 16, "vocab_size": 11, "depth": 1, "width": 8, "heads": 2, "mlp_width": 8}
    return parse_config(
        {
            "name": "fixed",
            "model": {**model, "mask_schedule": kind},
            "blocks": {"count": 1},
            "training": {"steps": 1},
        }
    )


def _rows(n: int) -> tuple[torch.Tensor, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    tokens = torch.randint(11, (n, 16), generator=torch.Generator().manual_seed(1))
    return tokens, np.arange(n, dtype=np.int64)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_block_terms_add_up_to_the_whole(kind: str) -> None:
    """On a fixed model, the sum over the ranges is the bound without a partition, within Monte Carlo error."""
    module, (tokens, rows) = _fixed(kind), _rows(1000)
    whole = range_nats(module, tokens, rows, WHOLE, 0)
    for count in (2, 3, 5):
        ranges = partition_levels(MaskSchedule(kind), count)  # type: ignore[arg-type]
        terms = torch.stack([range_nats(module, tokens, rows, own, 1 + i) for i, own in enumerate(ranges)])
        differences = terms.sum(dim=0) - whole
        error = float(differences.std()) / math.sqrt(len(rows))
        assert abs(float(differences.mean())) < 4 * error
        assert error < 0.02 * float(whole.mean())


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_blind_model_has_the_cross_entropy_of_its_unigrams(kind: str) -> None:
    module, (tokens, rows) = _fixed(kind, blind=True), _rows(4000)
    exact = float(-module.head.bias.detach().log_softmax(dim=0)[tokens].sum(dim=1).mean())
    ranges = partition_levels(MaskSchedule(kind), 3)  # type: ignore[arg-type]
    terms = [float(range_nats(module, tokens, rows, own, index).mean()) for index, own in enumerate(ranges)]
    assert sum(terms) == pytest.approx(exact, rel=0.01)
    assert terms == pytest.approx([exact / 3] * 3, rel=0.02)


def test_estimates_do_not_depend_on_batches() -> None:
    # In float64: kernels of float32 round differently in batches of other sizes, on some CPUs by too much.
    module, (tokens, rows) = _fixed("linear").double(), _rows(12)
    together = range_nats(module, tokens, rows, WHOLE, 0)
    apart = torch.cat([range_nats(module, tokens[i : i + 5], rows[i : i + 5], WHOLE, 0) for i in (0, 5, 10)])
    torch.testing.assert_close(together, apart)
    assert not torch.allclose(together, range_nats(module, tokens, rows, WHOLE, 1))


def test_levels_fill_the_range_in_every_row_and_over_rows() -> None:
    own, rows = NoiseRange(low=0.2, high=0.6), np.arange(50, dtype=np.int64)
    draws = list(elbo._draws(MaskSchedule("linear"), rows, own, 0, 8))
    levels = torch.stack([level for level, _ in draws])
    assert levels.shape == (elbo.DRAWS, 50)
    parts = ((levels - 0.2) / 0.4 * elbo.DRAWS).floor()
    assert torch.equal(parts, torch.arange(elbo.DRAWS)[:, None].expand(-1, 50).float())
    gaps = levels[0].sort().values.diff()
    assert gaps.max() < 2.7 * 0.4 / elbo.DRAWS / 50
    assert all(masks.any(dim=1).all() for _, masks in draws)


def _check(result: Evaluation, rows: int) -> list[float]:
    assert (result.metric.name, result.metric.better) == ("bits_per_character", "lower")
    assert result.predict == "bits_per_character"
    assert (result.split, result.rows) == ("test", rows)
    assert list(result.readouts) == ["bits_per_character"]
    assert Evaluation.from_json(json.loads(json.dumps(result.as_json()))) == result
    if result.kind == "blocks":
        assert [point["block"] for point in result.chain] == [0, 1, 2]
        assert [point["level"] for point in result.chain] == pytest.approx([1, 2 / 3, 1 / 3])
        assert result.also == {}
        return [point["bits_per_character"] for point in result.chain]
    assert result.chain == ()
    assert list(result.also) == [f"range {index}: bits_per_character" for index in range(3)]
    return list(result.also.values())


def test_evaluating_blocks_and_baseline(
    blocks: TextUnmasker, baseline: TextUnmasker, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elbo, "EVALUATED_ROWS", 300)
    told: list[tuple[int, int]] = []
    ours = evaluate_unmasking(blocks, shards, progress=lambda done, total: told.append((done, total)))
    theirs = evaluate(baseline.model, "test")
    assert told[-1] == (ours.rows, ours.rows)
    for result in (ours, theirs):
        terms = _check(result, 300)
        assert sum(terms) == pytest.approx(result.value)
        assert 2.0 < result.value < 5.5  # 8.01 without training
        assert terms[0] > terms[-1] > 0.5
    assert evaluate_unmasking(blocks, shards, batch_size=50).value == pytest.approx(ours.value, rel=1e-6)


def test_rows_of_a_large_split(blocks: TextUnmasker, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elbo, "EVALUATED_ROWS", 10)
    asked: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    gather = shards.gather
    watched = SimpleNamespace(
        rows=shards.rows, split="test", gather=lambda column, rows: (asked.append(rows), gather(column, rows))[1]
    )
    assert evaluate_unmasking(blocks, watched).rows == 10  # type: ignore[arg-type]
    chosen = np.concatenate(asked)
    assert len(set(chosen.tolist())) == 10
    assert chosen[-1] > 0.85 * shards.rows


def test_characters_are_counted_not_bytes(blocks: TextUnmasker, tmp_path: Path) -> None:
    """The same characters in one and in two bytes: nothing but the denominator and the model's surprise differ."""
    results = {}
    for letter in "aé":
        (tmp_path / "text.txt").write_text(letter * 40 * LENGTH, encoding="utf-8")
        folder = tmp_path / letter
        prepare(str(tmp_path / "text.txt"), folder, length=LENGTH)
        test = ShardSet.open(folder, "test")
        module, rows = blocks.network(0), np.arange(test.rows, dtype=np.int64)
        tokens = torch.from_numpy(test.gather("tokens", rows).astype(np.int64))
        characters = test.rows * LENGTH // len(letter.encode())
        nats = sum(
            float(range_nats(blocks.network(index), tokens, rows, own, index).sum())
            for index, own in enumerate(blocks.ranges)
        )
        results[letter] = evaluate_unmasking(blocks, test).value
        assert results[letter] == pytest.approx(nats / math.log(2) / characters, rel=1e-5)
        assert module.length == LENGTH
    assert [elbo._characters(token) for token in (b"", b"a", "é".encode(), "é".encode()[1:], b"a b")] == [0, 1, 1, 0, 3]
