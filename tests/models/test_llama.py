from __future__ import annotations

import math

import pytest
import torch
from small_text import LENGTH, text_config
from torch import Tensor

from dbtrain.model_config import LlamaConfig
from dbtrain.models.llama import ContextCache, KVCache, LlamaLayer, Rotary, noisy_mask

WIDTH, CONDITION = 16, 8


def _model(**fields: object) -> LlamaConfig:
    model = text_config(model=fields).model
    assert isinstance(model, LlamaConfig)
    return model


def _layer(model: LlamaConfig, condition: int | None = CONDITION) -> LlamaLayer:
    torch.manual_seed(0)
    layer = LlamaLayer(model, condition=condition).eval().requires_grad_(False)
    for name, value in layer.named_parameters():
        if "norm" in name:
            value.copy_(1 + 0.3 * torch.randn_like(value))
    return layer


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps) * weight


def _turned(x_k: Tensor, position: int, theta: float) -> Tensor:
    """Coordinates j and j + k/2 as one complex number, turned by position * theta^(-2j/k)."""
    half = len(x_k) // 2
    angles = torch.tensor([position * theta ** (-2 * j / len(x_k)) for j in range(half)])
    turned = torch.complex(x_k[:half], x_k[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat([turned.real, turned.imag])


def _one_token(
    layer: LlamaLayer,
    model: LlamaConfig,
    own: tuple[Tensor, int],
    earlier: list[tuple[Tensor, int]],
    condition_c: Tensor | None = None,
) -> Tensor:
    """The layer's output for one (token, position), which attends to clean (token, position)s and to itself."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = torch.zeros(6, WIDTH)
    if condition_c is not None:
        assert layer.modulation is not None
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = layer.modulation(condition_c).chunk(6)
    attention, x = layer.self_attn, own[0]
    normed = _norm(x, layer.input_layernorm.weight, model.norm_eps) * (1 + scale_a) + shift_a
    seen = [(_norm(token, layer.input_layernorm.weight, model.norm_eps), at) for token, at in earlier]
    seen.append((normed, own[1]))
    size, mixed = WIDTH // model.heads, []
    for head in range(model.heads):
        rows = slice(head * size, (head + 1) * size)
        kv_head = head * (model.kv_heads or model.heads) // model.heads
        kv_rows = slice(kv_head * size, (kv_head + 1) * size)
        query = _turned(attention.q_proj.weight[rows] @ normed, own[1], model.rope_theta)
        scores, values = [], []
        for token, at in seen:
            key = _turned(attention.k_proj.weight[kv_rows] @ token, at, model.rope_theta)
            scores.append(float(query @ key) / math.sqrt(size))
            values.append(attention.v_proj.weight[kv_rows] @ token)
        shares = [math.exp(score) for score in scores]
        mixed.append(sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares))
    x = x + (1 + gate_a) * (attention.o_proj.weight @ torch.cat(mixed))  # type: ignore[arg-type]
    normed = _norm(x, layer.post_attention_layernorm.weight, model.norm_eps) * (1 + scale_m) + shift_m
    gate, up = layer.mlp.gate_proj.weight @ normed, layer.mlp.up_proj.weight @ normed
    return x + (1 + gate_m) * (layer.mlp.down_proj.weight @ (gate * torch.sigmoid(gate) * up))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_layer_token_by_token(kv_heads: int) -> None:
    model = _model(kv_heads=kv_heads, rope_theta=50.0, norm_eps=0.1)
    layer, x = _layer(model, None), torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    said = layer(x[None], Rotary(model)(slice(0, LENGTH)))[0]
    for i in range(LENGTH):
        expected = _one_token(layer, model, (x[i], i), [(x[j], j) for j in range(i)])
        torch.testing.assert_close(said[i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_two_streams_token_by_token(kv_heads: int) -> None:
    """The noisy token of target i stands at i + 1 and attends to the clean ones up to position i, and to itself."""
    model = _model(kv_heads=kv_heads, rope_theta=50.0)
    layer, source = _layer(model), torch.Generator().manual_seed(1)
    clean, noisy = torch.randn(2, LENGTH, WIDTH, generator=source)
    condition = torch.randn(LENGTH, CONDITION, generator=source)
    rest = (condition[None], Rotary(model)(slice(0, LENGTH + 1)), noisy_mask(LENGTH, clean))
    said_clean, said_noisy = (said[0] for said in layer.two_streams((clean[None], noisy[None]), *rest))
    for i in range(LENGTH):
        expected = _one_token(layer, model, (noisy[i], i + 1), [(clean[j], j) for j in range(i + 1)], condition[i])
        torch.testing.assert_close(said_noisy[i], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(said_clean, layer(clean[None], rest[1][:, :-1])[0])
    unread = layer.two_streams((clean[None], noisy[None]), *rest, False)
    assert torch.equal(unread[1][0], said_noisy)
    assert torch.equal(unread[0][0], clean)


def test_names_and_shapes_are_those_of_hugging_face() -> None:
    shapes = {name: tuple(p.shape) for name, p in _layer(_model(kv_heads=2), None).named_parameters()}
    assert shapes == {
        "input_layernorm.weight": (16,),
        "self_attn.q_proj.weight": (16, 16),
        "self_attn.k_proj.weight": (8, 16),
        "self_attn.v_proj.weight": (8, 16),
        "self_attn.o_proj.weight": (16, 16),
        "post_attention_layernorm.weight": (16,),
        "mlp.gate_proj.weight": (24, 16),
        "mlp.up_proj.weight": (24, 16),
        "mlp.down_proj.weight": (16, 24),
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_reading_in_pieces_of_any_length(kv_heads: int) -> None:
    """Rows that are read in pieces of different lengths come to the same as whole rows."""
    model = _model(kv_heads=kv_heads)
    layer, rotary = _layer(model, None), Rotary(model)
    x = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    whole = layer(x, rotary(slice(0, LENGTH)))
    cache, done = KVCache(model, 1, 3, x), torch.zeros(3, dtype=torch.int64)
    for counts in ((1, 4, 2), (5, 0, 1), (4, 8, 1), (2, 0, 6)):
        piece = torch.zeros(3, max(counts), WIDTH)
        for row, count in enumerate(counts):
            piece[row, :count] = x[row, done[row] : done[row] + count]
        ids = torch.zeros(3, max(counts), dtype=torch.int64)
        where = cache.place(ids, torch.tensor(counts))
        said = layer.read(piece, rotary(where.positions), cache, 0, where)
        cache.advance(where)
        for row, count in enumerate(counts):
            torch.testing.assert_close(said[row, :count], whole[row, done[row] : done[row] + count])
        done += torch.tensor(counts)
        assert torch.equal(cache.lengths, done)
        assert cache.longest == done.max()


def test_a_cache_does_not_outgrow_its_room() -> None:
    cache = KVCache(_model(), 1, 2, torch.zeros(1))
    with pytest.raises(ValueError, match="13 tokens do not fit into a cache for 12"):
        cache.place(torch.zeros(2, LENGTH + 1, dtype=torch.int64), torch.tensor([3, LENGTH + 1]))


def test_the_context_of_each_rows_newest_token() -> None:
    cache = ContextCache(_model(), 1, 3, torch.zeros(1))
    for numbers, counts in (
        (torch.tensor([[1.0, 2.0], [3.0, 0.0], [4.0, 5.0]]), (2, 1, 2)),
        (torch.tensor([[6.0], [0.0], [7.0]]), (1, 0, 1)),
    ):
        x = numbers[..., None].expand(-1, -1, _model().width)
        cache.remember(x, cache.place(numbers.long(), torch.tensor(counts)))
    assert cache.context[:, 0].tolist() == [6, 3, 7]
