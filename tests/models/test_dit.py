from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.models import family_of
from dbtrain.models.dit import DiTDenoiser, sincos_positions, unpatchify
from dbtrain.models.layers import TransformerLayer, patchify
from dbtrain.plan import NoiseRange
from dbtrain.training.planner import make_plan

SmallConfig = Callable[..., RunConfig]
RANGE = NoiseRange(low=0.2, high=5.0)


@pytest.fixture
def config(small_config: SmallConfig) -> RunConfig:
    return small_config(model={"family": "dit", "dropout": 0.0})


def _unconditional(small_config: SmallConfig) -> RunConfig:
    return small_config(model={"family": "dit", "dropout": 0.0, "num_classes": None})


def _block(config: RunConfig, seed: int = 0) -> DiTDenoiser:
    torch.manual_seed(seed)
    block = family_of(config).build_block(config, (0, 2), RANGE, None)
    assert isinstance(block, DiTDenoiser)
    return block


def _batch(n: int = 16) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    return {"image": torch.randn(n, 1, 8, 8, generator=source), "label": torch.randint(10, (n,), generator=source)}


def _train_a_little(block: DiTDenoiser, steps: int) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.3)
    source = torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        block.training_loss(_batch(), block.draw(16, source)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_starts_as_the_best_linear_denoiser(config: RunConfig) -> None:
    """For data of variance sigma_data^2: D = c_skip z, whose weighted error is known."""
    block = _block(config)
    z, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.002, 0.5, 3.0, 80.0])
    expected = (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1, 1) * z
    torch.testing.assert_close(block(z, sigma, torch.zeros(4, dtype=torch.int64)), expected)
    image = 0.5 * torch.randn(5000, 1, 8, 8)
    levels = torch.linspace(0.2, 5.0, 5000)
    mean = block.errors(image, levels, torch.randn(image.shape), None).mean()
    assert mean.item() == pytest.approx(1.0, abs=0.02)


def test_training_loss_by_hand(config: RunConfig) -> None:
    block = _block(config)
    _train_a_little(block, 5)
    batch = _batch()
    draw = {**block.draw(16, torch.Generator().manual_seed(3)), "hidden": torch.arange(16) % 4 == 0}
    total = 0.0
    for i in range(16):
        sigma, image = float(draw["sigma"][i]), batch["image"][i]
        label = 10 if i % 4 == 0 else int(batch["label"][i])
        z = image + sigma * draw["eps"][i]
        estimate = block(z[None], draw["sigma"][i : i + 1], torch.tensor([label]))[0].detach()
        total += (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * float((estimate - image).square().mean())
    assert block.training_loss(batch, draw).item() == pytest.approx(total / 16, rel=1e-4)


def test_label_dropout_hides_its_part(small_config: SmallConfig) -> None:
    for dropout in (0.0, 0.1, 0.5):
        block = _block(small_config(model={"family": "dit", "label_dropout": dropout}))
        hidden = block.draw(4000, torch.Generator().manual_seed(5))["hidden"]
        assert hidden.double().mean().item() == pytest.approx(dropout, abs=0.03)


def test_draw_follows_generator_and_range(config: RunConfig) -> None:
    block = _block(config)
    one, again, other = (block.draw(64, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert {name: value.shape for name, value in one.items()} == {"sigma": (64,), "eps": (64, 1, 8, 8), "hidden": (64,)}
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert RANGE.low <= one["sigma"].min() < one["sigma"].max() <= RANGE.high


def test_every_parameter_learns(config: RunConfig, small_config: SmallConfig) -> None:
    plain = _unconditional(small_config)
    for module in (_block(config), _block(plain), family_of(config).build_end_to_end(config)):
        assert isinstance(module, DiTDenoiser)
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        _train_a_little(module, 4)
        for name, parameter in module.named_parameters():
            assert not torch.equal(parameter, start[name]), name


def test_estimate_depends_on_all_it_is_told(config: RunConfig) -> None:
    block = _block(config)
    _train_a_little(block, 30)
    z, sigma, label = torch.randn(1, 1, 8, 8), torch.tensor([1.0]), torch.tensor([3])
    said = block(z, sigma, label)
    others = [block(-z, sigma, label), block(z, 2 * sigma, label), block(z, sigma, label + 1), block(z, sigma, None)]
    for other in others:
        assert (other - said).abs().max() > 1e-5
    assert torch.equal(others[-1], block(z, sigma, torch.tensor([10])))


def test_a_label_means_different_things_at_different_noise(config: RunConfig) -> None:
    """What the label adds to the condition is not the same at every noise level."""
    block = _block(config)
    label, none = torch.tensor([3]), torch.tensor([10])
    added = [
        block._condition(sigma, label) - block._condition(sigma, none)
        for sigma in (torch.tensor([0.01]), torch.tensor([50.0]))
    ]
    assert (added[0] - added[1]).abs().max() > 1e-2 * added[0].abs().max()


def test_unconditional_model_reads_no_label(small_config: SmallConfig) -> None:
    block = _block(_unconditional(small_config))
    draw, batch = block.draw(16, torch.Generator().manual_seed(3)), _batch()
    assert "hidden" not in draw
    assert torch.equal(block.training_loss({"image": batch["image"]}, draw), block.training_loss(batch, draw))


def test_samples_do_not_see_each_other(config: RunConfig) -> None:
    block = _block(config)
    _train_a_little(block, 5)
    batch, draw = _batch(), block.draw(16, torch.Generator().manual_seed(3))
    together = block(draw["eps"], draw["sigma"], batch["label"])
    alone = block(draw["eps"][5:6], draw["sigma"][5:6], batch["label"][5:6])
    torch.testing.assert_close(together[5:6], alone)


def test_losses_are_float32_under_autocast(config: RunConfig) -> None:
    """At low noise the error is a small difference: bfloat16 would lose it."""
    block = _block(config)
    _train_a_little(block, 5)
    image, eps, sigma = torch.randn(32, 1, 8, 8), torch.randn(32, 1, 8, 8), torch.full((32,), 0.003)
    exact = block.errors(image, sigma, eps, None).mean()
    with torch.autocast("cpu", torch.bfloat16):
        rough = block.errors(image, sigma, eps, None).mean()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.05)


def test_baseline_is_the_same_network_with_all_layers_and_noise(config: RunConfig) -> None:
    whole = family_of(config).build_end_to_end(config)
    assert isinstance(whole, DiTDenoiser)
    assert whole.trained == NoiseRange(low=config.noise.sigma_min, high=config.noise.sigma_max)
    assert sum(isinstance(m, TransformerLayer) for m in whole.modules()) == config.model.depth
    block = _block(config)
    ours = {n: p.shape for n, p in block.named_parameters() if not n.startswith("layers")}
    assert ours == {n: p.shape for n, p in whole.named_parameters() if not n.startswith("layers")}


def test_recomputing_changes_no_gradient(config: RunConfig) -> None:
    gradients = []
    for recompute in (False, True):
        block = _block(config)
        _train_a_little(block, 3)
        block.recompute = recompute
        block.zero_grad()
        draw = block.draw(16, torch.Generator().manual_seed(4))
        block.training_loss(_batch(), draw).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in block.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_plans_of_blocks_and_baseline(config: RunConfig) -> None:
    plan, whole = make_plan(config), make_plan(config, "end_to_end")
    assert [block.layers for block in plan.blocks] == [(0, 2), (2, 3), (3, 4)]
    assert plan.blocks[0].noise is not None
    assert plan.blocks[0].noise.high == config.noise.sigma_max
    assert plan.layer_evaluations == pytest.approx(whole.layer_evaluations, rel=0.02)
    assert plan.codebook_sha256 is None
    for block in (*plan.blocks, *whole.blocks):
        assert block.parameters > 0
        assert block.bytes.activations > 0
        assert block.flops_per_sample > 0


def test_steps_need_not_reach_every_block(small_config: SmallConfig) -> None:
    assert small_config(model={"family": "dit"}, chain={"steps": 1}).chain.steps == 1


def test_guidance_needs_both_kinds_of_model(small_config: SmallConfig) -> None:
    for changes in ({"num_classes": None}, {"label_dropout": 0.0}):
        with pytest.raises(UserError, match=r"chain\.guidance 2\.0 needs"):
            small_config(model={"family": "dit", **changes}, chain={"guidance": 2.0})


def test_positions_tell_all_patches_apart() -> None:
    for side, width in ((4, 16), (16, 64), (5, 6), (1, 8)):
        positions = sincos_positions(side, width)
        assert positions.shape == (side * side, width)
        assert positions.abs().max() <= 1
        distances = torch.cdist(positions, positions) + 9 * torch.eye(side * side)
        assert distances.min() > 0.05


def test_unpatchify_inverts_patchify() -> None:
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(unpatchify(patchify(image, 2), (3, 8, 8), 2), image)


def test_example_batch_looks_like_a_real_one(config: RunConfig) -> None:
    example = family_of(config).example_batch(config, 16)
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {k: (v.shape, v.dtype) for k, v in _batch().items()}
