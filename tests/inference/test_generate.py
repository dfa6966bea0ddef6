from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from text_models import small_language_model
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import READOUTS
from dbtrain.diffusion.chain import read_out, run_chain
from dbtrain.errors import UserError
from dbtrain.inference.decoding import Decoding
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.text_sessions import open_session
from dbtrain.models.causal_lm import CausalLMBlock
from dbtrain.models.llama import ContextCache, LlamaMLP
from dbtrain.randomness import derive_key, keyed_normal

LENGTH = 32
PROMPTS = ["The ", "def f(x):", "Z"]


@pytest.fixture(scope="module")
def blocks(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    return small_language_model(topics, tmp_path_factory.mktemp("runs") / "blocks")


@pytest.fixture(scope="module")
def two_streams(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    model = {"noisy_layers": None}
    return small_language_model(topics, tmp_path_factory.mktemp("runs") / "two-streams", model=model)


@pytest.fixture(scope="module")
def baseline(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    return small_language_model(topics, tmp_path_factory.mktemp("runs") / "baseline", "end_to_end")


@pytest.fixture
def chain(request: pytest.FixtureRequest) -> AssembledModel:
    """The fixture that the test's parameter names."""
    model: AssembledModel = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="module", params=["blocks", "two_streams", "baseline"])
def generator(request: pytest.FixtureRequest) -> TextGenerator:
    return TextGenerator(request.getfixturevalue(request.param))


def _uncached(model: AssembledModel, row: list[int], key: int, index: int, steps: int, readout: str) -> Tensor:
    """Probabilities (V,) of the token after `row`, with nothing remembered from one token or step to the next."""
    tokens = torch.tensor([row + [0] * (LENGTH - len(row))])
    if model.end_to_end:
        logits: Tensor = model.modules[0](tokens)
        return logits[0, len(row)].softmax(dim=-1)
    assert model.codebook is not None
    width = model.codebook.shape[1]

    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        codes = torch.zeros(1, LENGTH, width)
        codes[0, len(row)] = z[0]
        said: Tensor = model.modules[block](tokens, codes, torch.full((1, 1), sigma))
        return said[:, len(row)].log_softmax(dim=-1)

    traces = []
    for noise in range(model.config.chain.start_noises):
        start = 80.0 * keyed_normal(derive_key(key, "start", noise), np.array([index]), width)
        config = model.config
        traces.append(run_chain(denoise, model.ranges, model.codebook, config.noise, steps, config.chain.bridge, start))
    return read_out(traces, readout)[0]


@pytest.mark.parametrize("chain", ["blocks", "two_streams"], indirect=True)
@pytest.mark.parametrize("readout", READOUTS)
@torch.inference_mode()
def test_the_cached_chain_is_the_uncached_one(chain: AssembledModel, readout: str) -> None:
    """At every place of rows of different lengths, to 1e-5."""
    source, keys, steps = torch.Generator().manual_seed(0), [11, 12, 13], 4
    rows = torch.randint(256, (3, LENGTH), generator=source)
    lengths = torch.tensor([1, 9, 4])
    session = open_session(chain, keys, steps, readout)
    session.read(rows[:, :9], lengths)
    for index in range(LENGTH - 9):
        said = session.probabilities(index)
        for row, key in enumerate(keys):
            expected = _uncached(chain, rows[row, : lengths[row]].tolist(), key, index, steps, readout)
            torch.testing.assert_close(said[row], expected, atol=1e-5, rtol=0)
        if index % 5 == 4:
            going = torch.tensor([1, 0, 1])
            session.read(rows[torch.arange(3), lengths][:, None], going)
            lengths = lengths + going
        elif lengths.max() < LENGTH - 1:
            session.read(rows[torch.arange(3), lengths][:, None], torch.ones(3, dtype=torch.int64))
            lengths = lengths + 1


@torch.inference_mode()
def test_writing_is_the_uncached_chain_read_token_by_token(generator: TextGenerator) -> None:
    model = generator.model
    [written] = generator.generate(["The "], greedy=True, tokens=8)
    row = list(b"The ")
    key = derive_key(0, "generate", "The ", 0)
    for index in range(8):
        row.append(int(_uncached(model, row, key, index, 3, "product").argmax()))
    assert written == bytes(row[4:]).decode(errors="replace")


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_text_does_not_depend_on_the_others(generator: TextGenerator, options: dict[str, float]) -> None:
    together = generator.generate(PROMPTS, **options)  # type: ignore[arg-type]
    assert together == [generator.generate([prompt], **options)[0] for prompt in PROMPTS]  # type: ignore[arg-type]
    assert together[::-1] == generator.generate(PROMPTS[::-1], **options)  # type: ignore[arg-type]
    assert generator.generate("Z", **options) == [together[2]]  # type: ignore[arg-type]


def test_texts_follow_the_seed(generator: TextGenerator) -> None:
    ours, again, other = (generator.generate(PROMPTS, seed=seed) for seed in (1, 1, 2))
    assert ours == again
    assert all(a != b for a, b in zip(ours, other, strict=True))
    assert len(set(generator.generate(["The "] * 5))) == 5  # asked for again, another text


def test_options_change_what_is_written(blocks: AssembledModel) -> None:
    generator = TextGenerator(blocks)
    plain = generator.generate(PROMPTS)
    assert generator.generate(PROMPTS, readout="product") == plain  # as configured
    for options in ({"readout": "last"}, {"steps": 9}, {"temperature": 0.3}, {"top_p": 0.2}, {"greedy": True}):
        assert generator.generate(PROMPTS, **options) != plain, options  # type: ignore[arg-type]


def _with_separator(model: AssembledModel, separator: int) -> TextGenerator:
    generator = TextGenerator(model)
    generator.tokenizer.separator = separator
    if separator >= 0:
        generator.tokenizer.token_bytes[separator] = b""
    return generator


def test_a_text_that_does_not_end_fills_the_window(generator: TextGenerator) -> None:
    endless = _with_separator(generator.model, -1)
    ids = [endless.tokenizer.encode(prompt) for prompt in PROMPTS]
    room = [LENGTH - len(each) for each in ids]
    written = endless.continue_ids(ids, room, [1, 2, 3], Decoding())
    assert [len(each) for each in written] == room
    for prompt, start in zip(PROMPTS, endless.generate(PROMPTS, tokens=3, greedy=True), strict=True):
        assert endless.generate(prompt, greedy=True)[0].startswith(start)
        assert len(start.encode()) == 3


def test_a_text_ends_at_the_separator(generator: TextGenerator) -> None:
    [whole] = _with_separator(generator.model, -1).generate("The ", greedy=True, tokens=12)
    likeliest = whole[5]
    ending = _with_separator(generator.model, ord(likeliest))
    assert ending.generate("The ", greedy=True, tokens=12) == [whole[: whole.index(likeliest)]]


@pytest.mark.parametrize("chain", ["blocks", "two_streams"], indirect=True)
def test_each_token_is_read_once(chain: AssembledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a token does not grow with what was written before, but for attending to it."""
    reads: list[tuple[int, ...]] = []
    asked: list[int] = []
    passes: list[int] = []
    read, denoise = CausalLMBlock.read, CausalLMBlock.denoise

    def counted_read(block: CausalLMBlock, cache: ContextCache, tokens_nt: Tensor, *counts: Tensor) -> None:
        reads.append(tuple(tokens_nt.shape))
        read(block, cache, tokens_nt, *counts)

    def counted_denoise(block: CausalLMBlock, cache: ContextCache, z_nd: Tensor, sigma_n: Tensor) -> Tensor:
        asked.append(len(z_nd))
        return denoise(block, cache, z_nd, sigma_n)

    monkeypatch.setattr(CausalLMBlock, "read", counted_read)
    monkeypatch.setattr(CausalLMBlock, "denoise", counted_denoise)
    mlp = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda layer, x: passes.append(x.shape[1]) or mlp(layer, x))
    generator = _with_separator(chain, -1)
    generator.generate("The ", tokens=10)
    assert sorted(reads) == [(1, 1)] * 3 * (1 + 9) + [(1, 4)] * 3
    assert asked == [1] * 3 * 10
    layers, noisy = chain.config.model.depth, int(chain.config.model.noisy_layers is None)  # type: ignore[attr-defined]
    # The begin token; then each token that was read, and in the second stream the noisy one that comes after it.
    assert sorted(passes) == sorted([1] * layers + [1 + noisy] * layers * 9 + [4 + noisy] * layers)
    reads.clear()
    generator.generate("The ", tokens=10, readout="first")
    assert sorted(reads) == [(1, 1)] * (1 + 9) + [(1, 4)]  # blocks without a say read nothing


BAD = [
    ({"prompts": ""}, "--prompt = '': is empty"),
    ({"prompts": ["The ", ""]}, "--prompt = '': is empty"),
    ({"prompts": "x" * 32}, "is 32 tokens long; the model's window of 32 .* at most 31"),
    ({"prompts": "x" * 500}, r"--prompt = 'x{60}\.\.\.': is 500 tokens long"),
    ({"tokens": 0}, "--tokens = 0: has to be at least 1"),
    ({"tokens": 29}, "--tokens = 29: do not fit behind a prompt of 4 .* at most 28"),
    ({"temperature": 0.0}, "--temperature = 0.0: has to be above 0 .*--greedy"),
    ({"temperature": float("nan")}, "--temperature = nan"),
    ({"top_p": 0.0}, "--top-p = 0.0"),
    ({"top_p": 1.5}, "--top-p = 1.5"),
    ({"greedy": True, "temperature": 0.5}, "--temperature = 0.5: has no meaning with --greedy"),
    ({"greedy": True, "top_p": 0.5}, "--top-p = 0.5: has no meaning with --greedy"),
    ({"steps": 0}, "--steps = 0: has to be at least 1"),
    ({"readout": "middle"}, "--readout = 'middle': is not a read-out of this model"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(generator: TextGenerator, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generator.generate(**{"prompts": "The ", **options})  # type: ignore[arg-type]


def test_bad_chains(blocks: AssembledModel, baseline: AssembledModel) -> None:
    with pytest.raises(UserError, match=r"--steps = 2: would skip some of the 3 blocks \(give at least 3\)"):
        TextGenerator(blocks).generate("The ", steps=2)
    with pytest.raises(UserError, match="--steps = 3: has no meaning for an end-to-end network"):
        TextGenerator(baseline).generate("The ", steps=3)
    with pytest.raises(UserError, match=r"--readout = 'first': .*leave it out"):
        TextGenerator(baseline).generate("The ", readout="first")
