from __future__ import annotations

import pytest
import torch
from torch import nn

from dbtrain.models.layers import (
    FinalNorm,
    NoiseEmbedding,
    SelfAttention,
    TransformerLayer,
    initialise,
    patchify,
    rotary_table,
    rotate,
)


def test_patchify_against_a_loop() -> None:
    n, c, size, patch = 2, 3, 6, 2
    images = torch.arange(n * c * size * size).reshape(n, c, size, size)
    patches = patchify(images, patch)
    across = size // patch
    assert patches.shape == (n, across**2, c * patch**2)
    for image in range(n):
        for row in range(across):
            for column in range(across):
                expected = [
                    int(images[image, channel, row * patch + y, column * patch + x])
                    for channel in range(c)
                    for y in range(patch)
                    for x in range(patch)
                ]
                assert patches[image, row * across + column].tolist() == expected


def test_attention_against_its_formula() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, heads=2, dropout=0.0).eval()
    x = torch.randn(3, 5, 8)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(dim=-1) @ v[..., head])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, dim=-1)))


def test_rotary_attention_sees_distances_alone() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, heads=2, dropout=0.0).eval()
    x, table = torch.randn(3, 5, 8), rotary_table(4, 12)
    near = attention(x, table[:, :5])
    torch.testing.assert_close(attention(x, table[:, 7:]), near)
    assert (attention(x, table[:, [0, 1, 2, 3, 9]]) - near).abs().max() > 1e-3
    # Without positions, attention cannot tell the order of what it attends to.
    order = [0, 3, 1, 4, 2]
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])
    assert (attention(x[:, order], table[:, :5]) - near[:, order]).abs().max() > 1e-3


def test_rotation_by_hand() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, rotary_table(4, 5, theta=100.0))
    for position in range(5):
        for pair, wavelength in ((0, 1.0), (1, 10.0)):
            a, b = x[..., position, pair], x[..., position, pair + 2]
            angle = torch.tensor(position / wavelength)
            torch.testing.assert_close(turned[..., position, pair], a * angle.cos() - b * angle.sin())
            torch.testing.assert_close(turned[..., position, pair + 2], b * angle.cos() + a * angle.sin())


def test_fresh_conditioned_layer_is_the_identity() -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(16, 2, 32, dropout=0.0, conditioned=True)
    initialise(layer)
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer(x, torch.randn(2, 16)), x)
    plain = TransformerLayer(16, 2, 32, dropout=0.0, conditioned=False)
    initialise(plain)
    assert not torch.allclose(plain(x), x)


def test_a_layer_conditions_each_sample_by_itself() -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(16, 2, 32, dropout=0.0, conditioned=True).eval()  # PyTorch's own start: nothing is zero
    norm = FinalNorm(16, conditioned=True)
    x, condition = torch.randn(4, 5, 16), torch.randn(4, 16)
    one_by_one = torch.cat([layer(x[i : i + 1], condition[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(layer(x, condition), one_by_one)
    assert not torch.allclose(layer(x, condition), layer(x, condition.flip(0)))
    assert not torch.allclose(norm(x[:, 0], condition), norm(x[:, 0], condition.flip(0)))


def test_dropout_is_off_in_evaluation() -> None:
    layer = TransformerLayer(16, 2, 32, dropout=0.5, conditioned=False)
    x = torch.randn(2, 5, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_noise_embedding_tells_levels_apart() -> None:
    embedding = NoiseEmbedding(16)
    levels = torch.linspace(-1.6, 1.1, 50)
    embedded = embedding(levels)
    assert embedded.shape == (50, 16)
    assert (embedded[1:] - embedded[:-1]).norm(dim=1).min() > 1e-4
    assert list(embedding.state_dict()) == ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]


@pytest.mark.parametrize("conditioned", [True, False])
def test_initialise_zeroes_what_it_says(conditioned: bool) -> None:
    layer = TransformerLayer(8, 2, 16, dropout=0.0, conditioned=conditioned)
    initialise(layer)
    zero = {name for name, parameter in layer.named_parameters() if not parameter.any()}
    biases = {f"{name}.bias" for name, child in layer.named_modules() if isinstance(child, nn.Linear | nn.LayerNorm)}
    expected = {name for name, _ in layer.named_parameters()} & biases
    assert zero == expected | ({"modulation.weight"} if conditioned else set())
