"""Llama layers (Touvron et al. 2023), plain and with a second, noisy stream, and their key-value cache.

Parameters have the names and shapes of a layer of Hugging Face's Llama, so weights move between the two unchanged.

Two streams. A denoising block predicts every token of a row in one pass. Its *clean* stream is an ordinary causal
transformer over [begin, x_0, ..., x_{L-2}], at positions 0 to L - 1. Its *noisy* stream has one token a target, at the
position the target would take: the one for x_i stands at i + 1 and attends to the clean tokens at positions up to i and
to itself, never to another noisy token. Nothing of the clean stream depends on noise, hence its keys and values can be
cached once for all noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbtrain.model_config import LlamaConfig
from dbtrain.models.layers import modulate, rotary_table, rotate

Streams = tuple[Tensor, Tensor]
"""Clean and noisy tokens, (N, L, width) each."""
_Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values of some tokens -> all that these attend to."""


class Rotary(nn.Module):
    """The rotary embedding's table for the positions of a row and the begin token before it."""

    table: Tensor

    def __init__(self, model: LlamaConfig):
        super().__init__()
        table = rotary_table(model.width // model.heads, model.length + 1, model.rope_theta)
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: slice | Tensor) -> Tensor:
        """Cosine and sine, (2, T, head width) for a slice of positions, (2, N, T, head width) for positions (N, T)."""
        return self.table[:, positions]


def noisy_mask(length: int, like: Tensor) -> Tensor:
    """What the noisy stream attends to, as SDPA adds it to scores: (L, 2 L) over [clean keys ; noisy keys].

    Row i allows the clean keys up to i and its own noisy key. Of the type and device of `like`.
    """
    allowed = torch.cat(
        [
            torch.ones(length, length, dtype=torch.bool, device=like.device).tril(),
            torch.eye(length, dtype=torch.bool, device=like.device),
        ],
        dim=1,
    )
    return torch.zeros(length, 2 * length, dtype=like.dtype, device=like.device).masked_fill(~allowed, -torch.inf)


class KVCache:
    """Keys and values of the clean tokens read so far, by layer and row; rows may differ in length."""

    def __init__(self, model: LlamaConfig, layers: int, batch_size: int, like: Tensor):
        """Room for `model.length` tokens a row (the begin token included), of the type and device of `like`."""
        # One more than that: the place of a noisy token, which stands right behind the clean ones for as long as it is
        # looked at, so that nothing has to be copied to put them side by side.
        shape = (layers, batch_size, model.kv_heads or model.heads, model.length + 1, model.width // model.heads)
        # Zeros, because a masked key takes part with weight 0, and 0 times what lay in memory before may be NaN.
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        """Clean tokens read, by row."""
        self.longest = 0
        """The greatest of `lengths`."""
        self.unread: tuple[Tensor, Appended] | None = None
        """Tokens (N, T) that are still to go through the layers, for a block that waits with them until it is asked."""

    @property
    def capacity(self) -> int:
        """Tokens a row has room for."""
        return self.keys.shape[3] - 1

    def place(self, tokens_nt: Tensor, counts_n: Tensor | None) -> Appended:
        """Where the first `counts_n` tokens of each row (all, if None) will stand.

        Raises:
            ValueError: a row would outgrow the cache.
        """
        n, t = tokens_nt.shape
        counts = torch.full((n,), t, device=tokens_nt.device) if counts_n is None else counts_n
        positions = self.lengths[:, None] + torch.arange(t, device=tokens_nt.device)
        longest = int((self.lengths + counts).max())
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens do not fit into a cache for {self.capacity}")
        rows, columns = (torch.arange(t, device=tokens_nt.device) < counts[:, None]).nonzero(as_tuple=True)
        mask = torch.arange(longest, device=tokens_nt.device) <= positions[..., None]
        # Padding stands at positions that need not exist; it is neither kept nor asked for.
        return Appended(counts, positions.clamp_max(self.capacity), rows, columns, mask[:, None], longest)

    def noisy_mask(self) -> Tensor:
        """(N, 1, 1, longest + 1): a noisy token attends to its row's clean tokens and, in the last place, to itself."""
        places = torch.arange(self.longest + 1, device=self.lengths.device)
        return ((places < self.lengths[:, None]) | (places == self.longest))[:, None, None]

    def write(self, layer: int, where: Appended, k_nhtk: Tensor, v_nhtk: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values of one layer; returns all of that layer, (N, H, longest, k) each."""
        rows, columns = where.rows, where.columns
        at = where.positions[rows, columns]
        self.keys[layer][rows, :, at] = k_nhtk.transpose(1, 2)[rows, columns]
        self.values[layer][rows, :, at] = v_nhtk.transpose(1, 2)[rows, columns]
        return self.keys[layer, :, :, : where.longest], self.values[layer, :, :, : where.longest]

    def beside(self, layer: int, k_nh1k: Tensor, v_nh1k: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of one layer with those of a noisy token of each row behind them, (N, H, longest + 1, k)
        each; they stay until something else is put there."""
        self.keys[layer, :, :, self.longest] = k_nh1k[:, :, 0]
        self.values[layer, :, :, self.longest] = v_nh1k[:, :, 0]
        return self.keys[layer, :, :, : self.longest + 1], self.values[layer, :, :, : self.longest + 1]

    def advance(self, where: Appended) -> None:
        """Count the tokens in."""
        self.lengths = self.lengths + where.counts
        self.longest = where.longest


class ContextCache(KVCache):
    """Keys and values, and the context of each row's newest token, where its next noisy token starts from."""

    def __init__(self, model: LlamaConfig, layers: int, batch_size: int, like: Tensor):
        super().__init__(model, layers, batch_size, like)
        self.context = torch.zeros(batch_size, model.width, dtype=like.dtype, device=like.device)

    def remember(self, e_ntd: Tensor, where: Appended) -> None:
        """Keep the context of the newest tokens."""
        newest = e_ntd[torch.arange(len(e_ntd), device=e_ntd.device), (where.counts - 1).clamp_min(0)]
        self.context = torch.where(where.counts[:, None] > 0, newest, self.context)


@dataclass(frozen=True)
class Appended:
    """Where new tokens go in a cache."""

    counts: Tensor
    """(N,): how many of each row are real, the others are padding behind them."""
    positions: Tensor
    """(N, T)."""
    rows: Tensor
    """Row of each real token."""
    columns: Tensor
    """Its column."""
    mask: Tensor
    """(N, 1, T, longest): the keys it attends to."""
    longest: int
    """Tokens in the longest row afterwards."""


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions, no biases."""

    def __init__(self, model: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads = model.heads, model.kv_heads or model.heads
        self.head_width = model.width // model.heads
        self.q_proj = nn.Linear(model.width, self.heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(model.width, self.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(model.width, self.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_width, model.width, bias=False)
        self.dropout = model.dropout

    def queries(self, x_ntd: Tensor, rotation: Tensor) -> Tensor:
        """(N, heads, T, k)."""
        return rotate(self._split(self.q_proj(x_ntd)), rotation)

    def keys_values(self, x_ntd: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """(N, kv_heads, T, k) each."""
        return rotate(self._split(self.k_proj(x_ntd)), rotation), self._split(self.v_proj(x_ntd))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Mix the values, (N, T, width); causally where there is no mask."""
        if self.kv_heads != self.heads and mask is not None and mask.dim() == 4:
            return self._attend_grouped(q, k, v, mask)
        if self.kv_heads != self.heads:
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _attend_grouped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Over a cache: the heads that share keys become further queries of one, so that the cache is not copied."""
        n, heads, t, width = q.shape
        groups = heads // self.kv_heads
        queries = q.reshape(n, self.kv_heads, groups * t, width)
        mixed = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask.repeat(1, 1, groups, 1))
        out: Tensor = self.o_proj(mixed.reshape(n, heads, t, width).transpose(1, 2).flatten(2))
        return out

    def _split(self, x_ntd: Tensor) -> Tensor:
        return x_ntd.view(*x_ntd.shape[:2], -1, self.head_width).transpose(1, 2)


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer 2020), no biases."""

    def __init__(self, model: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(model.width, model.mlp_width, bias=False)
        self.up_proj = nn.Linear(model.width, model.mlp_width, bias=False)
        self.down_proj = nn.Linear(model.mlp_width, model.width, bias=False)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x_ntd: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.dropout(F.silu(self.gate_proj(x_ntd)) * self.up_proj(x_ntd)))
        return out


class RMSNorm(nn.RMSNorm):
    """PyTorch's, with its weight in the type of what it norms: under autocast two types would keep it from fusing."""

    def forward(self, x: Tensor) -> Tensor:
        """Normed over the last dimension, in the type of `x`."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LlamaLayer(nn.Module):
    """A Llama layer. A conditioned one has a noisy stream beside the clean one, through the same weights.

    Noisy tokens are modulated by a condition: shift and scale after each norm, a gate (1 + g) on what attention and MLP
    add. The projection that makes them starts at zero, so a noisy token starts as an ordinary one.
    """

    called_in_training: ClassVar = ("two_streams",)
    """Methods that stand in for the forward pass: what hooks into that, such as FSDP2, hooks into these too."""

    def __init__(self, model: LlamaConfig, *, condition: int | None):
        """`condition` is the size of the condition vector; None for a layer without a noisy stream."""
        super().__init__()
        self.input_layernorm = RMSNorm(model.width, model.norm_eps)
        self.self_attn = LlamaAttention(model)
        self.post_attention_layernorm = RMSNorm(model.width, model.norm_eps)
        self.mlp = LlamaMLP(model)
        self.dropout = nn.Dropout(model.dropout)
        self.modulation = None if condition is None else nn.Linear(condition, 6 * model.width)

    def forward(self, x_ntd: Tensor, rotation: Tensor) -> Tensor:
        """The plain causal layer; `rotation` (2, T, k) is that of positions 0 to T - 1."""
        normed = self.input_layernorm(x_ntd)
        return self._rest(x_ntd, normed, *self.self_attn.keys_values(normed, rotation), rotation, None)

    def two_streams(
        self, streams: Streams, condition_nlc: Tensor, rotation: Tensor, mask: Tensor, keep_clean: bool = True
    ) -> Streams:
        """Both streams of a training pass.

        Args:
            streams: clean tokens at positions 0 to L - 1 and noisy ones at 1 to L.
            condition_nlc: (N, L, condition), or (N, 1, condition) for one noise level a row.
            rotation: (2, L + 1, k), of positions 0 to L.
            mask: `noisy_mask` of L.
            keep_clean: false where nobody reads the clean stream any more: it comes back as it was, after giving its
                keys and values to the noisy one.
        """
        clean, noisy = streams
        normed = self.input_layernorm(clean)
        k, v = self.self_attn.keys_values(normed, rotation[:, :-1])
        out = self._noisy(noisy, self._modulation(condition_nlc), partial(_behind, k, v), rotation[:, 1:], mask)
        if keep_clean:
            clean = self._rest(clean, normed, k, v, rotation[:, :-1], None)
        return clean, out

    def read(self, x_ntd: Tensor, rotation: Tensor, cache: KVCache, index: int, where: Appended) -> Tensor:
        """Clean tokens that come after those in the cache, as layer `index` of it; they are added there."""
        normed = self.input_layernorm(x_ntd)
        k, v = cache.write(index, where, *self.self_attn.keys_values(normed, rotation))
        return self._rest(x_ntd, normed, k, v, rotation, where.mask)

    def denoise(
        self, x_n1d: Tensor, condition_n1c: Tensor, rotation: Tensor, cache: KVCache, index: int, mask: Tensor
    ) -> Tensor:
        """One noisy token a row over the cached clean ones; `mask` (N, 1, 1, longest + 1) ends with its own key."""
        return self._noisy(x_n1d, self._modulation(condition_n1c), partial(cache.beside, index), rotation, mask)

    def read_and_denoise(
        self,
        x_ntd: Tensor,
        condition_n1c: Tensor,
        rotation: Tensor,
        cache: KVCache,
        index: int,
        where: Appended,
        mask: Tensor,
    ) -> Tensor:
        """`read` of all tokens but the last, and `denoise` of that, in one go through the weights.

        The cache has counted the clean tokens in already; `mask` (N, 1, T, longest + 1) has the rows of both.
        """

        def join(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            cache.write(index, where, k[:, :, :-1], v[:, :, :-1])
            return cache.beside(index, k[:, :, -1:], v[:, :, -1:])

        # Shift, scale and gate 0 are those of a clean token.
        modulation = F.pad(self._modulation(condition_n1c), (0, 0, x_ntd.shape[1] - 1, 0))
        return self._noisy(x_ntd, modulation, join, rotation, mask)

    def _rest(
        self, x_ntd: Tensor, normed: Tensor, k: Tensor, v: Tensor, rotation: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The layer's output for clean tokens, once their keys and values are there."""
        x_ntd = x_ntd + self.dropout(self.self_attn.attend(self.self_attn.queries(normed, rotation), k, v, mask))
        out: Tensor = x_ntd + self.dropout(self.mlp(self.post_attention_layernorm(x_ntd)))
        return out

    def _modulation(self, condition_ntc: Tensor) -> Tensor:
        """(N, T, 6 width)."""
        assert self.modulation is not None
        out: Tensor = self.modulation(condition_ntc)
        return out

    def _noisy(self, x_ntd: Tensor, modulation: Tensor, join: _Join, rotation: Tensor, mask: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        normed = modulate(self.input_layernorm(x_ntd), shift_a, scale_a)
        k, v = join(*self.self_attn.keys_values(normed, rotation))
        hidden = self.self_attn.attend(self.self_attn.queries(normed, rotation), k, v, mask)
        x_ntd = x_ntd + (1 + gate_a) * self.dropout(hidden)
        hidden = self.mlp(modulate(self.post_attention_layernorm(x_ntd), shift_m, scale_m))
        out: Tensor = x_ntd + (1 + gate_m) * self.dropout(hidden)
        return out


def read_layers(
    layers: Iterable[nn.Module], x_ntd: Tensor, rotation: Tensor, cache: KVCache, index: int, where: Appended
) -> Tensor:
    """Clean tokens through layers, of which the first has number `index` in the cache."""
    for number, layer in enumerate(layers, start=index):
        assert isinstance(layer, LlamaLayer)
        x_ntd = layer.read(x_ntd, rotation, cache, number, where)
    return x_ntd


def _behind(k_clean: Tensor, v_clean: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A `_Join`: keys and values of the noisy stream behind those of the clean one."""
    return torch.cat([k_clean, k], dim=2), torch.cat([v_clean, v], dim=2)
