from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dbtrain.config import RunConfig
from dbtrain.diffusion.codebook import digest
from dbtrain.models import family_of
from dbtrain.models.layers import TransformerLayer
from dbtrain.models.vit import ViTBlock, ViTEndToEnd
from dbtrain.plan import NoiseRange

SmallConfig = Callable[..., RunConfig]
RANGE = NoiseRange(low=0.2, high=5.0)


def _block(config: RunConfig, seed: int = 0) -> ViTBlock:
    torch.manual_seed(seed)
    family = family_of(config)
    block = family.build_block(config, (0, 2), RANGE, family.codebook(config))
    assert isinstance(block, ViTBlock)
    return block


def _batch(n: int = 16) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    return {"image": torch.randn(n, 1, 8, 8, generator=source), "label": torch.randint(10, (n,), generator=source)}


def _train_a_little(block: ViTBlock | ViTEndToEnd, steps: int) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    source = torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        block.training_loss(_batch(), block.draw(16, source)).backward()
        optimizer.step()


@pytest.mark.parametrize("weight", ["unit", "edm"])
def test_training_loss_by_hand(small_config: SmallConfig, weight: str) -> None:
    config = small_config(model={"dropout": 0.0}, noise={"weight": weight})
    block = _block(config)
    _train_a_little(block, 3)
    batch = _batch()
    draw = block.draw(16, torch.Generator().manual_seed(3))
    total, cross_entropies, factors = 0.0, [], []
    for i in range(16):
        label, sigma, eps = int(batch["label"][i]), float(draw["sigma"][i]), draw["eps"][i]
        z = block.codebook[label] + sigma * eps
        logits = block(batch["image"][i : i + 1], z[None], draw["sigma"][i : i + 1])[0].detach()
        cross_entropies.append(float(-logits.log_softmax(dim=0)[label]))
        factors.append(1.0 if weight == "unit" else (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
        total += factors[-1] * cross_entropies[-1]
    assert block.training_loss(batch, draw).item() == pytest.approx(total / 16, rel=1e-4)
    if weight == "edm":  # each sample has its own weight: the product of two means is another number
        wrong = sum(factors) / 16 * sum(cross_entropies) / 16
        assert abs(wrong - total / 16) > 1e-3 * wrong


def test_draw_follows_generator_and_range(small_config: SmallConfig) -> None:
    block = _block(small_config())
    one, again, other = (block.draw(64, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert one["sigma"].shape == (64,)
    assert one["eps"].shape == (64, 16)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert RANGE.low <= one["sigma"].min() < one["sigma"].max() <= RANGE.high


def test_codebook_is_frozen(small_config: SmallConfig) -> None:
    config = small_config()
    block = _block(config)
    before = digest(block.codebook)
    assert not block.codebook.requires_grad
    assert "codebook" in dict(block.named_buffers())
    assert not any("codebook" in name for name in [*block.state_dict(), *dict(block.named_parameters())])
    _train_a_little(block, 3)
    assert digest(block.codebook) == before == digest(_block(config, seed=9).codebook)
    assert block.codebook.grad is None


def test_every_parameter_learns(small_config: SmallConfig) -> None:
    config = small_config(model={"dropout": 0.0})
    for module in (_block(config), ViTEndToEnd(config)):
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        _train_a_little(module, 4)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
            assert not torch.equal(parameter, start[name]), name


def test_output_depends_on_image_code_and_noise_level(small_config: SmallConfig) -> None:
    block = _block(small_config(model={"dropout": 0.0}))
    _train_a_little(block, 5)
    image = _batch(1)["image"]
    z, sigma = torch.randn(1, 16, generator=torch.Generator().manual_seed(4)), torch.tensor([1.0])
    said = block(image, z, sigma)
    assert said.shape == (1, 10)
    for other in (block(image.flip(-1), z, sigma), block(image, -z, sigma), block(image, z, 3 * sigma)):
        assert (other - said).abs().max() > 1e-4


def test_samples_do_not_see_each_other(small_config: SmallConfig) -> None:
    block = _block(small_config()).eval()
    batch, draw = _batch(), block.draw(16, torch.Generator().manual_seed(3))
    together = block(batch["image"], draw["eps"], draw["sigma"])
    alone = block(batch["image"][5:6], draw["eps"][5:6], draw["sigma"][5:6])
    torch.testing.assert_close(together[5:6], alone)


def test_blocks_share_no_parameter(small_config: SmallConfig) -> None:
    config = small_config()
    family = family_of(config)
    codebook = family.codebook(config)
    blocks = [family.build_block(config, (i, i + 1), RANGE, codebook) for i in range(3)]
    places = [p.untyped_storage().data_ptr() for block in blocks for p in block.parameters()]
    assert len(set(places)) == len(places)
    _train_a_little(blocks[0], 1)  # type: ignore[arg-type]
    assert all(p.grad is None for block in blocks[1:] for p in block.parameters())


def test_end_to_end_stands_on_the_same_layers(small_config: SmallConfig) -> None:
    config = small_config(model={"dropout": 0.0})
    family = family_of(config)
    whole, block = family.build_end_to_end(config), _block(config)
    layers = [m for m in whole.modules() if isinstance(m, TransformerLayer)]
    assert len(layers) == config.model.depth
    assert [type(m) for m in block.layers] == [TransformerLayer] * 2
    for name in ("attention", "mlp"):
        ours, theirs = getattr(block.layers[0], name), getattr(layers[0], name)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
    batch = _batch()
    expected = F.cross_entropy(whole(batch["image"]), batch["label"])
    assert torch.equal(whole.training_loss(batch, whole.draw(16, torch.Generator())), expected)


def test_example_batch_looks_like_a_real_one(small_config: SmallConfig) -> None:
    config = small_config()
    example = family_of(config).example_batch(config, 16)
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {k: (v.shape, v.dtype) for k, v in _batch().items()}
