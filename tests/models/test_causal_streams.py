"""What the tokens of a causal model may know of each other, and that a cache changes nothing about it."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from small_text import LENGTH, VOCAB, causal_block, causal_lm, noisy_codes, random_tokens, text_config
from torch import Tensor

from dbtrain.models.causal_lm import CausalLM, CausalLMBlock

VARIANTS: list[dict[str, object]] = [
    {"noisy_layers": None},
    {"noisy_layers": None, "kv_heads": 2, "tie_head": True, "separator": 3},
    {"noisy_layers": 1, "kv_heads": 2},
    {"noisy_layers": 0},
]


def _block(variant: dict[str, object]) -> CausalLMBlock:
    return _trained(json.dumps(variant))[0]


def _whole(variant: dict[str, object]) -> CausalLM:
    return _trained(json.dumps(variant))[1]


@lru_cache
@torch.inference_mode(False)
def _trained(variant: str) -> tuple[CausalLMBlock, CausalLM]:
    """Trained once for all tests, which change nothing in it."""
    config = text_config(model={"clean_loss": 1.0, **json.loads(variant)})
    return causal_block(config), causal_lm(config)


def _same(a: Tensor, b: Tensor) -> list[bool]:
    """By position, whether it is the same bit for bit in every row."""
    return [torch.equal(a[:, i], b[:, i]) for i in range(a.shape[1])]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changed", range(LENGTH))
def test_a_token_is_seen_by_later_ones_alone(variant: dict[str, object], changed: int) -> None:
    """Changing token j changes no output for x_0 ... x_j, in the clean stream, the noisy stream and end to end."""
    block, whole = _block(variant), _whole(variant)
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCAB
    expected = [i <= changed for i in range(LENGTH)]
    before, after = (block(x, z, sigma, clean=True) for x in (tokens, other))
    assert _same(before[:, :LENGTH], after[:, :LENGTH]) == expected
    assert _same(before[:, LENGTH:], after[:, LENGTH:]) == expected
    assert _same(block(tokens, z, sigma), block(other, z, sigma)) == expected
    assert _same(whole(tokens), whole(other)) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changed", range(LENGTH))
def test_noise_is_seen_by_its_own_target_alone(variant: dict[str, object], changed: int) -> None:
    block = _block(variant)
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    other_z, other_sigma = z.clone(), sigma.clone()
    other_z[:, changed] += 1.0
    other_sigma[:, changed] *= 2.0
    before = block(tokens, z, sigma, clean=True)
    for after in (block(tokens, other_z, sigma, clean=True), block(tokens, z, other_sigma, clean=True)):
        assert _same(before, after) == [i != changed for i in range(2 * LENGTH)]


def test_rows_do_not_see_each_other() -> None:
    block = _block({})
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    torch.testing.assert_close(block(tokens, z, sigma)[5:6], block(tokens[5:6], z[5:6], sigma[5:6]))


def _next_tokens(block: CausalLMBlock, prompts: list[int]) -> Tensor:
    """Logits (N, L, V), NaN before each row's prompt ends: prompts read at once, then token by token."""
    tokens, (z, sigma) = random_tokens(len(prompts)), noisy_codes(block, len(prompts))
    cache, counts = block.start_cache(len(prompts)), torch.tensor(prompts)
    if max(prompts):
        block.read(cache, tokens[:, : max(prompts)], counts)
    said = torch.full((len(prompts), LENGTH, VOCAB), torch.nan)
    rows = torch.arange(len(prompts))
    for _ in range(LENGTH - min(prompts)):
        at = counts.clamp_max(LENGTH - 1)
        logits = block.denoise(cache, z[rows, at], sigma[rows, at])
        going = counts < LENGTH
        said[rows[going], at[going]] = logits[going]
        onward = (counts < LENGTH - 1).long()
        block.read(cache, tokens[rows, at][:, None], onward)
        counts = counts + going
    return said


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompts", [[0, 0, 0], [5, 5, 5], [1, 7, 0], [11, 2, 6]])
@torch.inference_mode()
def test_cached_blocks_say_the_same(variant: dict[str, object], prompts: list[int]) -> None:
    block = _block(variant)
    tokens, (z, sigma) = random_tokens(3), noisy_codes(block, 3)
    expected, said = block(tokens, z, sigma), _next_tokens(block, prompts)
    for row, start in enumerate(prompts):
        assert said[row, :start].isnan().all()
        torch.testing.assert_close(said[row, start:], expected[row, start:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_what_was_read_waits_until_it_is_asked_for(variant: dict[str, object]) -> None:
    """Reading twice before asking, and asking twice of what was read, are as good as one after the other."""
    block = _block(variant)
    tokens, (z, sigma) = random_tokens(3), noisy_codes(block, 3)
    expected, cache = block(tokens, z, sigma), block.start_cache(3)
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        block.read(cache, tokens[:, part])
    for _ in range(2):
        other = block.denoise(cache, z[:, 3], sigma[:, 3])  # leaves nothing behind
        torch.testing.assert_close(block.denoise(cache, z[:, 6], sigma[:, 6]), expected[:, 6], atol=1e-5, rtol=0)
        assert not torch.allclose(other, expected[:, 6])
    block.read(cache, tokens[:, 6:7])
    with pytest.raises(ValueError, match="do not fit"):
        block.read(cache, tokens)
    torch.testing.assert_close(block.denoise(cache, z[:, 7], sigma[:, 7]), expected[:, 7], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompts", [[1, 1, 1], [3, 7, 1], [11, 2, 6]])
@torch.inference_mode()
def test_the_cached_network_says_the_same(variant: dict[str, object], prompts: list[int]) -> None:
    whole, tokens = _whole(variant), random_tokens(3)
    expected, cache, counts = whole(tokens), whole.start_cache(3), torch.tensor(prompts)
    rows, logits = torch.arange(3), whole.read(cache, tokens[:, : max(prompts)], counts)
    while True:
        going = counts < LENGTH
        torch.testing.assert_close(logits[going], expected[rows[going], counts[going]], atol=1e-5, rtol=0)
        if not (counts < LENGTH - 1).any():
            break
        at = counts.clamp_max(LENGTH - 1)
        logits = whole.read(cache, tokens[rows, at][:, None], (counts < LENGTH - 1).long())
        counts = counts + 1


@torch.inference_mode()
def test_padding_in_a_cache_is_never_seen() -> None:
    """Whatever fills the short rows of a batch of prompts, later answers are the same."""
    block = _block({})
    tokens, (z, sigma) = random_tokens(3), noisy_codes(block, 3)
    counts, said = torch.tensor([2, 6, 1]), []
    for filler in (0, 9):
        padded = torch.where(torch.arange(6) < counts[:, None], tokens[:, :6], filler)
        cache = block.start_cache(3)
        block.read(cache, padded, counts)
        said.append(block.denoise(cache, z[:, 0], sigma[:, 0]))
        block.read(cache, padded[:, :1])
        said.append(block.denoise(cache, z[:, 0], sigma[:, 0]))
    assert torch.equal(said[0], said[2])
    assert torch.equal(said[1], said[3])
