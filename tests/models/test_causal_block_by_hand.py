"""What a causal block does with a noisy code, against the formulas (Karras et al. 2022, table 1)."""

from __future__ import annotations

import pytest
import torch
from small_text import LENGTH, VOCAB, causal_block, noisy_codes, random_tokens, text_config
from torch.nn import functional as F

from dbtrain.models.llama import noisy_mask


@pytest.mark.parametrize("separator", [None, 3])
@pytest.mark.parametrize("noisy_layers", [None, 1, 0])
def test_a_block_by_hand(noisy_layers: int | None, separator: int | None) -> None:
    """A noisy token starts as what was made of the token before it plus its code, at unit variance; the level goes in
    as ln(sigma)/4."""
    model = {"clean_loss": 1.0, "separator": separator, "noisy_layers": noisy_layers}
    block = causal_block(text_config(model=model, noise={"sigma_data": 0.3}))
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    begin = VOCAB - 1 if separator is None else separator
    clean = block.embed_tokens(torch.cat([torch.full((8, 1), begin), tokens[:, :-1]], dim=1))
    rotation, late = block.rotary(slice(0, LENGTH + 1)), 2 if noisy_layers is None else noisy_layers
    for layer in block.layers[: 2 - late]:
        clean = layer(clean, rotation[:, :-1])
    noisy = clean + F.linear(z / (sigma**2 + 0.3**2).sqrt()[..., None], block.code_stem.weight, block.code_stem.bias)
    condition, streams = block.noise_embedding(sigma.log().flatten() / 4).view(8, LENGTH, -1), (clean, noisy)
    for layer in block.layers[2 - late :]:
        streams = layer.two_streams(streams, condition, rotation, noisy_mask(LENGTH, clean))
    shift, scale = block.norm_modulation(condition).chunk(2, dim=-1)
    expected = block.head(torch.cat([block.norm(streams[1]) * (1 + scale) + shift, block.norm(streams[0])], dim=1))
    torch.testing.assert_close(block(tokens, z, sigma, clean=True), expected)
