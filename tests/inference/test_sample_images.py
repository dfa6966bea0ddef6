from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_models import LATENT_MEAN, LATENT_STD, image_model, latent_shards

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import RunConfig
from dbtrain.diffusion.partition import owner
from dbtrain.diffusion.sampler import network_calls
from dbtrain.errors import UserError
from dbtrain.inference.sample_images import ImageSampler

SmallConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def model(small_config: SmallConfig, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    config = small_config(
        model={"family": "dit", "dropout": 0.0}, chain={"steps": 4}, optimiser={"lr": 5e-3}, training={"steps": 30}
    )
    return image_model(config, tmp_path_factory.mktemp("runs") / "blocks")


@pytest.fixture(scope="module")
def sampler(model: AssembledModel) -> ImageSampler:
    return ImageSampler(model)


@pytest.fixture(scope="module")
def unconditional(small_config: SmallConfig, tmp_path_factory: pytest.TempPathFactory) -> ImageSampler:
    config = small_config(model={"family": "dit", "num_classes": None}, training={"steps": 2})
    return ImageSampler(image_model(config, tmp_path_factory.mktemp("runs") / "plain"))


def _close(a: Any, b: Any) -> bool:
    """Rounding may tip a pixel over; another starting noise changes hundreds of levels."""
    return bool(np.abs(a.astype(int) - b.astype(int)).max() <= 1)


def _calls(sampler: ImageSampler, **how: Any) -> list[tuple[int, float, bool]]:
    """Which block is asked at which sigma, and whether it is told labels, while two images are drawn."""
    calls: list[tuple[int, float, bool]] = []
    hooks = []
    for index, module in enumerate(sampler.model.modules):

        def note(_: Any, args: Any, index: int = index) -> None:
            assert args[0].dtype == torch.float32
            assert args[1].unique().numel() == 1
            calls.append((index, float(args[1][0]), args[2] is not None))

        hooks.append(module.register_forward_pre_hook(note))
    try:
        sampler.sample(2, **how)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def test_images(sampler: ImageSampler) -> None:
    images = sampler.sample(5)
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 5


def test_a_sample_depends_on_seed_index_and_label_alone(sampler: ImageSampler) -> None:
    images = sampler.sample(7, [1, 2], seed=3)
    torch.manual_seed(99)
    assert np.array_equal(sampler.sample(7, [1, 2], seed=3), images)
    assert _close(sampler.sample(7, [1, 2], seed=3, batch_size=3), images)
    assert _close(sampler.sample(3, [1, 2, 1, 7], seed=3, batch_size=1), images[:3])
    assert not _close(sampler.sample(7, [1, 2], seed=4), images)
    assert (sampler.sample(2, [1, 7], seed=3)[1] != images[1]).any()


def test_labels_are_gone_through_in_turn(sampler: ImageSampler) -> None:
    given = sampler.labels_for(12)
    assert given is not None
    assert given.tolist() == [*range(10), 0, 1]
    assert sampler.label_ids(["7", "3"]) == [7, 3]
    assert np.array_equal(sampler.sample(3), sampler.sample(3, [0, 1, 2]))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 11])
def test_every_call_goes_to_the_owner_of_its_noise(sampler: ImageSampler, solver: str, steps: int) -> None:
    calls = _calls(sampler, steps=steps, solver=solver)
    assert len(calls) == network_calls(solver, steps)  # type: ignore[arg-type]
    ranges = sampler.model.ranges
    for index, sigma, _ in calls:
        assert ranges[index].low * (1 - 1e-6) <= sigma <= ranges[index].high * (1 + 1e-6)
    blocks = [index for index, _, _ in calls]
    assert blocks == sorted(blocks)
    assert steps < 11 or set(blocks) == {0, 1, 2}


def test_configured_walk_is_the_default(sampler: ImageSampler) -> None:
    assert _calls(sampler) == _calls(sampler, steps=4, solver="heun", guidance=1.0)


def test_guidance_asks_twice_and_goes_beyond_the_label(sampler: ImageSampler) -> None:
    assert [told for _, _, told in _calls(sampler, steps=2, solver="euler")] == [True] * 2
    assert [told for _, _, told in _calls(sampler, steps=2, solver="euler", guidance=2.0)] == [True, False] * 2
    positions = np.arange(4)
    z, label = sampler.start(positions, 0), torch.tensor([1, 2, 3, 4])
    assert owner(sampler.model.ranges, 1.0) == 0
    with torch.inference_mode():
        told, untold = (sampler.denoise(z, 1.0, label, guidance) for guidance in (1.0, 0.0))
        torch.testing.assert_close(sampler.denoise(z, 1.0, label, 3.0), untold + 3 * (told - untold))
        torch.testing.assert_close(untold, sampler.denoise(z, 1.0, None, 1.0))
    assert (told - untold).abs().max() > 1e-4


def test_start_is_standard_normal(sampler: ImageSampler) -> None:
    noise = sampler.start(np.arange(500), 0)
    assert noise.shape == (500, 1, 8, 8)
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(sampler.start(np.array([7]), 0)[0], noise[7])


def test_progress_ends_with_all_done(sampler: ImageSampler) -> None:
    told: list[tuple[int, int]] = []
    sampler.sample(5, batch_size=2, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (5, 5)
    assert len(told) == 3 * 4


def test_end_to_end_walks_with_one_network(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config(model={"family": "dit"}, training={"steps": 2})
    sampler = ImageSampler(image_model(config, tmp_path / "run", "end_to_end"))
    assert {index for index, _, _ in _calls(sampler)} == {0}
    assert sampler.sample(2).shape == (2, 8, 8, 1)


def test_unconditional(unconditional: ImageSampler) -> None:
    assert unconditional.labels_for(3) is None
    assert unconditional.sample(2, steps=3).shape == (2, 8, 8, 1)
    with pytest.raises(UserError, match=r"--guidance = 2\.0: needs a model"):
        unconditional.sample(2, guidance=2.0)
    with pytest.raises(UserError, match="trained without labels"):
        unconditional.sample(2, [1])
    with pytest.raises(UserError, match="trained without labels"):
        unconditional.label_ids(["1"])


def test_latents_come_in_the_units_of_the_data(small_config: SmallConfig, tmp_path: Path) -> None:
    """A network that has hardly been trained is the best linear denoiser, whose samples have the data's moments."""
    config = small_config(
        model={"family": "dit", "image_size": 4, "channels": 2, "patch_size": 2, "num_classes": None},
        data={"source": "latents", "path": str(latent_shards(tmp_path)), "augment": {}},
        optimiser={"lr": 1e-6},
        training={"steps": 1},
    )
    sampler = ImageSampler(image_model(config, tmp_path / "run"))
    latents = sampler.sample(400)
    assert latents.shape == (400, 2, 4, 4)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents.mean(axis=(0, 2, 3)), LATENT_MEAN, atol=0.15)
    np.testing.assert_allclose(latents.std(axis=(0, 2, 3)), LATENT_STD, rtol=0.1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"count": 0}, "--count = 0: has to be at least 1"),
        ({"count": -3}, "--count = -3"),
        ({"steps": 0}, "--steps = 0: has to be at least 1"),
        ({"batch_size": 0}, "--batch-size = 0"),
        ({"labels": [3, 10]}, r"--label = 10: is not a class \(they are 0 to 9\)"),
        ({"labels": [-1]}, "--label = -1"),
        ({"labels": []}, "names no class"),
        ({"guidance": -0.5}, r"--guidance = -0\.5"),
        ({"guidance": float("nan")}, "--guidance = nan"),
        ({"guidance": 1e300}, "beyond all bounds"),
        ({"solver": "dpm"}, r"--solver = 'dpm': is not a solver \(use euler or heun\)"),
        ({"seed": -1}, "--seed = -1"),
    ],
)
def test_bad_input(sampler: ImageSampler, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler.sample(**{"count": 2, **how})


def test_unknown_class_name(sampler: ImageSampler) -> None:
    with pytest.raises(UserError, match=r"--label = 'cat': is not a class \(they are 0, 1, 2"):
        sampler.label_ids(["cat"])
