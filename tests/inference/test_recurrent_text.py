"""Recurrent-depth models at work: what K iterations say, cached or not, and what evaluation tells of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_families import raw_config
from small_runs import start_run, train_all
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config_file import parse_config
from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.chain import read_out, run_chain
from dbtrain.errors import UserError
from dbtrain.inference import bits
from dbtrain.inference.bits import evaluate_text
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.runs import model_of
from dbtrain.inference.text_sessions import open_session
from dbtrain.plan import Kind
from dbtrain.randomness import derive_key, keyed_normal

LENGTH, ROWS = 32, 12
PROMPTS = ["The ", "def f(x):", "Z"]


def _model(shards: Path, where: Path, kind: Kind, count: int) -> AssembledModel:
    config = parse_config(
        raw_config(
            "recurrent_lm",
            shards,
            model={"iterations": 3, "backprop": 2},
            blocks={"count": count},
            training={"steps": 20},
            optimiser={"lr": 1e-2},
            chain={"steps": 4, "start_noises": 2},
            ema={"half_life": 0},
        )
    )
    return model_of(train_all(start_run(config, where, kind)))


@pytest.fixture(scope="module")
def block(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    return _model(topics, tmp_path_factory.mktemp("runs") / "run", "blocks", 1)


@pytest.fixture(scope="module")
def specialists(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    return _model(topics, tmp_path_factory.mktemp("runs") / "run", "blocks", 2)


@pytest.fixture(scope="module")
def baseline(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    return _model(topics, tmp_path_factory.mktemp("runs") / "run", "end_to_end", 1)


@pytest.fixture(params=["block", "specialists", "baseline"])
def model(request: pytest.FixtureRequest) -> AssembledModel:
    chosen: AssembledModel = request.getfixturevalue(request.param)
    return chosen


def _uncached(model: AssembledModel, row: list[int], key: int, index: int, steps: int) -> Tensor:
    """Probabilities (V,) of the token after `row` with nothing remembered."""
    tokens = torch.tensor([row + [0] * (LENGTH - len(row))])
    if model.end_to_end:
        logits: Tensor = model.modules[0](tokens, steps)
        return logits[0, len(row)].softmax(dim=-1)
    assert model.codebook is not None
    width = model.codebook.shape[1]

    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        codes = torch.zeros(1, LENGTH, width)
        codes[0, len(row)] = z[0]
        said: Tensor = model.modules[block](tokens, codes, torch.full((1, 1), sigma))
        return said[:, len(row)].log_softmax(dim=-1)

    start = 80.0 * keyed_normal(derive_key(key, "start", 0), np.array([index]), width)
    chain = run_chain(denoise, model.ranges, model.codebook, model.config.noise, steps, "softmax", start)
    return read_out([chain], "last")[0]


@pytest.mark.parametrize("steps", [2, 5])
@torch.inference_mode()
def test_a_cache_changes_nothing(model: AssembledModel, steps: int) -> None:
    """At every place of rows of different lengths, to 1e-5, and for numbers of iterations never trained with."""
    rows, keys = torch.randint(256, (3, LENGTH), generator=torch.Generator().manual_seed(0)), [11, 12, 13]
    lengths = torch.tensor([1, 9, 4])
    session = open_session(model, keys, steps, None)
    session.read(rows[:, :9], lengths)
    going = torch.ones(3, dtype=torch.bool)
    for index in range(LENGTH - 9):
        said = session.probabilities(index)
        for row, key in enumerate(keys):
            if going[row]:
                expected = _uncached(model, rows[row, : lengths[row]].tolist(), key, index, steps)
                torch.testing.assert_close(said[row], expected, atol=1e-5, rtol=0)
        going = torch.tensor([True, index % 3 > 0, True])
        session.read(rows[torch.arange(3), lengths][:, None], going.long())
        lengths = lengths + going


def test_text_follows_from_prompt_steps_and_seed(model: AssembledModel) -> None:
    generator = TextGenerator(model)
    written = generator.generate(PROMPTS, tokens=16, seed=3)
    assert all(len(text) > 0 for text in written)
    assert generator.generate(PROMPTS, tokens=16, seed=3) == written
    assert generator.generate(PROMPTS[::-1], tokens=16, seed=3) == written[::-1]
    assert generator.generate(PROMPTS, tokens=16, seed=4) != written
    default = 3 if model.end_to_end else 4
    assert generator.generate(PROMPTS, tokens=16, seed=3, steps=default) == written


def test_as_many_steps_as_one_likes(model: AssembledModel) -> None:
    generator = TextGenerator(model)
    least = len(model.modules)
    for steps in (least, 9):
        assert generator.generate("The ", tokens=4, steps=steps)[0]
    for steps in range(-1, least):
        with pytest.raises(UserError, match="--steps"):
            generator.generate("The ", tokens=4, steps=steps)


@pytest.fixture
def held_out(topics: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ShardSet, Tensor]:
    """The held-out split, of which some rows are evaluated; and these rows (ROWS, L)."""
    monkeypatch.setattr(bits, "EVALUATED_TOKENS", ROWS * LENGTH)
    monkeypatch.setattr(bits, "BATCH_NUMBERS", 5 * LENGTH * 257)
    shards = ShardSet.open(topics, "test")
    tokens = shards.gather("tokens", np.arange(ROWS) * shards.rows // ROWS)
    return shards, torch.from_numpy(tokens.astype(np.int64))


def _bits(log_probs: Tensor, tokens: Tensor) -> float:
    said = log_probs.reshape(-1, 257).gather(1, tokens.reshape(-1, 1))
    return -float(said.double().sum()) / math.log(2) / int((tokens != 256).sum())


@torch.inference_mode()
def test_evaluation_of_a_baseline(baseline: AssembledModel, held_out: tuple[ShardSet, Tensor]) -> None:
    shards, tokens = held_out
    result = evaluate_text(TextGenerator(baseline), shards)
    assert list(result.also) == [f"K={count}: bits_per_byte" for count in (1, 2, 4, 8, 16)]
    for count in (1, 16):
        expected = _bits(baseline.modules[0](tokens, count).log_softmax(dim=-1), tokens)
        assert result.also[f"K={count}: bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert result.value == pytest.approx(_bits(baseline.modules[0](tokens, 3).log_softmax(dim=-1), tokens), rel=1e-5)
    assert result.value < 8.0


@torch.inference_mode()
def test_evaluation_of_blocks(
    block: AssembledModel, specialists: AssembledModel, held_out: tuple[ShardSet, Tensor]
) -> None:
    shards, tokens = held_out
    for model, counts in ((block, (1, 2, 4, 8, 16)), (specialists, (2, 4, 8, 16))):
        generator, rows = TextGenerator(model), np.arange(ROWS) * shards.rows // ROWS
        result = evaluate_text(generator, shards)
        assert list(result.also) == [f"K={count}: bits_per_byte" for count in counts]
        for count in counts:
            trace = generator.trace(generator.contexts(tokens), rows, 0, count)
            assert len(trace.log_probs) == count
            expected = _bits(trace.log_probs[-1], tokens)
            assert result.also[f"K={count}: bits_per_byte"] == pytest.approx(expected, rel=1e-5)
        assert len(result.chain) == 4
        assert result.predict == "last"
        assert result.value == pytest.approx(result.also["K=4: bits_per_byte"], rel=1e-5)
    assert evaluate(block) == evaluate_text(TextGenerator(block), shards)


@torch.inference_mode()
def test_specialists_answer_for_their_ranges(specialists: AssembledModel, held_out: tuple[ShardSet, Tensor]) -> None:
    _, tokens = held_out
    generator = TextGenerator(specialists)
    trace = generator.trace(generator.contexts(tokens), np.arange(ROWS), 0)
    assert trace.blocks == (0, 0, 1, 1)
    assert trace.sigmas[2] == specialists.ranges[1].high
