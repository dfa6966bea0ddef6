"""Layers the families share: attention, the pre-norm transformer layer with AdaLN-zero, and the noise embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class SelfAttention(nn.Module):
    """Multi-head self-attention over (N, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x_ntd: Tensor, rotation: Tensor | None = None) -> Tensor:
        """`rotation`, a `rotary_table`, tells queries and keys their positions; without it they have none."""
        n, t, width = x_ntd.shape
        qkv = self.qkv(x_ntd).view(n, t, 3, self.heads, width // self.heads)
        q_nhtk, k_nhtk, v_nhtk = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None:
            q_nhtk, k_nhtk = rotate(q_nhtk, rotation), rotate(k_nhtk, rotation)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q_nhtk, k_nhtk, v_nhtk, dropout_p=dropout)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return out


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP; `conditioned` layers take shift, scale and gate from a condition (AdaLN-zero).

    AdaLN-zero (Peebles, Xie 2023, section 3.2): the projection that makes shifts, scales and gates starts at zero, so a
    conditioned layer is the identity at first. An unconditioned layer is the ordinary one with affine norms.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, *, conditioned: bool):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.attention = SelfAttention(width, heads, dropout)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_width, width),
        )
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * width) if conditioned else None

    def forward(self, x_ntd: Tensor, condition_nd: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
        if self.modulation is None:
            x_ntd = x_ntd + self.dropout(self.attention(self.norm_attention(x_ntd), rotation))
            plain: Tensor = x_ntd + self.dropout(self.mlp(self.norm_mlp(x_ntd)))
            return plain
        assert condition_nd is not None
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition_nd)[:, None].chunk(6, dim=-1)
        hidden = self.attention(modulate(self.norm_attention(x_ntd), shift_a, scale_a), rotation)
        x_ntd = x_ntd + gate_a * self.dropout(hidden)
        hidden = self.mlp(modulate(self.norm_mlp(x_ntd), shift_m, scale_m))
        conditioned: Tensor = x_ntd + gate_m * self.dropout(hidden)
        return conditioned


class FinalNorm(nn.Module):
    """The norm before the head, conditioned like the layers when `conditioned`."""

    def __init__(self, width: int, *, conditioned: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.modulation = nn.Linear(width, 2 * width) if conditioned else None

    def forward(self, x_nd: Tensor, condition_nd: Tensor | None = None) -> Tensor:
        normed: Tensor = self.norm(x_nd)
        if self.modulation is None:
            return normed
        assert condition_nd is not None
        shift, scale = self.modulation(condition_nd).chunk(2, dim=-1)
        return modulate(normed, shift, scale)


class NoiseEmbedding(nn.Module):
    """Embeds c_noise = ln(sigma)/4, shape (N,), in (N, width): sines and cosines, then a two-layer MLP.

    Angular frequencies grow geometrically from 1/16 to 2. Higher ones would not carry over to noise levels that
    training seldom draws, and inference starts at such a level: sigma_max.
    """

    def __init__(self, width: int, num_frequencies: int = 16):
        super().__init__()
        octaves = [-4 + 5 * index / (num_frequencies - 1) for index in range(num_frequencies)]
        frequencies = torch.tensor([2.0**octave for octave in octaves])
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, c_noise_n: Tensor) -> Tensor:
        assert isinstance(self.frequencies, Tensor)
        angles = c_noise_n[:, None] * self.frequencies[None]
        embedded: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return embedded


def apply_layers(layers: Iterable[Callable[..., Any]], x: Any, *rest: Any, recompute: bool = False) -> Any:
    """layer(x, *rest) for each layer in turn. With `recompute`, autograd keeps each layer's input alone."""
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(layer, kept(x), *rest, use_reentrant=False)
        else:
            x = layer(x, *rest)
    return x


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a module: what stands in its lists of modules, whichever they are; in lists inside these not."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else layers_of(child)
    return found


class _Kept(torch.autograd.Function):
    """The identity, in whose name autograd saves its input: what a checkpoint holds shows in saved-tensor hooks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def kept(x: Any) -> Any:
    """The tensor, or tuple of them, as one that autograd itself saves: what a checkpoint holds, no hook would see."""
    if isinstance(x, tuple):
        return tuple(kept(part) for part in x)
    return _Kept.apply(x) if isinstance(x, Tensor) and x.requires_grad else x  # type: ignore[no-untyped-call]


def rotary_table(size: int, length: int, theta: float = 10000.0) -> Tensor:
    """Cosines and sines of the rotary embedding (Su et al. 2021), (2, length, size), for heads of even width `size`.

    In the rotate-half layout of Hugging Face's Llama; `theta` is the base of the wavelengths.
    """
    wavelengths = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] / wavelengths
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x_nhtk: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of coordinates (j, j + k/2) by its position's angle; `rotation` is rows of a `rotary_table`,
    (2, T, k), or (2, N, T, k) where samples differ."""
    if rotation.dim() == 4:
        rotation = rotation[:, :, None]  # one angle for all heads
    cos, sin = rotation.to(x_nhtk.dtype).unbind()
    first, second = x_nhtk.chunk(2, dim=-1)
    return x_nhtk * cos + torch.cat([-second, first], dim=-1) * sin


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN's affine map, x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


def patchify(image_nchw: Tensor, patch_size: int) -> Tensor:
    """Cut images (N, C, H, W) into flattened patches (N, T, C * patch_size^2), row by row."""
    n, c, h, w = image_nchw.shape
    grid = image_nchw.view(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * patch_size * patch_size)


def initialise(module: nn.Module) -> None:
    """Glorot-uniform matrices and zero biases, as in DiT (Peebles, Xie 2023); zero for AdaLN projections."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            if name.endswith("modulation"):
                nn.init.zeros_(child.weight)
            else:
                nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
