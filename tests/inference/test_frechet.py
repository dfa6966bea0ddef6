from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from image_models import image_model, latent_shards
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import RunConfig
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import EvalTransform, LatentTransform
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.inference.evaluation import FRECHET_DISTANCE, Evaluation
from dbtrain.inference.feature_classifier import FEATURES, shuffled_rows, train_classifier
from dbtrain.inference.frechet import block_losses, evaluate_images, frechet_distance
from dbtrain.inference.sample_images import ImageSampler, Samples
from dbtrain.model_config import DiTConfig
from dbtrain.models.dit import DiTFamily
from dbtrain.models.family import Piece, register
from dbtrain.plan import Kind, NoiseRange

SmallConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
SCALE = EvalTransform((0.5,), (0.5,))


@pytest.fixture(scope="module")
def shards(digits: Path) -> ShardSet:
    return ShardSet.open(digits, "test")


@pytest.fixture(scope="module")
def model(small_config: SmallConfig, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    config = small_config(
        model={"family": "dit"}, chain={"steps": 5, "guidance": 1.5}, optimiser={"lr": 5e-3}, training={"steps": 30}
    )
    return image_model(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def evaluation(model: AssembledModel, shards: ShardSet) -> Evaluation:
    return evaluate_images(ImageSampler(model), shards, samples=200)


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_against_the_matrix_root() -> None:
    """The formula as it is written, with SciPy's root of the product."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = _normal(300, 6, 0) @ _normal(6, 6, 1) + 2, _normal(200, 6, 2) @ _normal(6, 6, 3)
    c_a, c_b = (np.cov(x.numpy().T, bias=True) for x in (a, b))
    means = float((a.mean(0) - b.mean(0)).square().sum())
    expected = means + np.trace(c_a + c_b - 2 * linalg.sqrtm(c_a @ c_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_distance_in_closed_form() -> None:
    """Of one-dimensional Gaussians: squared differences of means and of standard deviations."""
    a = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert frechet_distance(a, 3 * a + torch.tensor([5.0, 0.0])) == pytest.approx(25 + 4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_distance_of_singular_covariances() -> None:
    """Fewer rows than features, and features that never change."""
    a = torch.cat([_normal(10, 30, 0), torch.zeros(10, 4)], dim=1)
    shifted = a.clone()
    shifted[:, 33] = 2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, shifted) == pytest.approx(4, abs=1e-6)


def test_classifier_knows_the_digits(digits: Path, shards: ShardSet) -> None:
    train = ShardSet.open(digits, "train")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    classifier = train_classifier(train, SCALE, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    (batch,) = shuffled_rows(shards, SCALE, shards.rows, CPU)
    features, logits = classifier(batch["image"])
    assert features.shape == (shards.rows, FEATURES)
    assert features.var(dim=0).mean().item() == pytest.approx(1, abs=0.15)
    assert (logits.argmax(-1) == batch["label"]).double().mean() > 0.9


def test_classifier_learns_turns_where_there_are_no_classes(tmp_path: Path) -> None:
    train = ShardSet.open(latent_shards(tmp_path), "train")
    classifier = train_classifier(train, LatentTransform((5.0, -2.0), (3.0, 0.25)), CPU)
    assert classifier(torch.zeros(1, 2, 4, 4))[1].shape == (1, 4)


def test_rows_are_shuffled_and_each_comes_once(shards: ShardSet) -> None:
    (batch,) = shuffled_rows(shards, SCALE, shards.rows, CPU)
    stored = torch.from_numpy(shards.gather("label", np.arange(shards.rows)))
    assert torch.equal(batch["label"].sort().values, stored.sort().values)
    assert not torch.equal(batch["label"], stored)
    parts = list(shuffled_rows(shards, SCALE, 700, CPU))
    assert [len(part["label"]) for part in parts] == [500, 200]


def test_evaluation(evaluation: Evaluation) -> None:
    assert evaluation.metric == FRECHET_DISTANCE
    assert evaluation.predict == "heun_5"
    assert set(evaluation.readouts) == {"heun_5", "euler_9", "heun_6"}
    assert set(evaluation.also) == {
        "frechet_distance of training rows",
        "accuracy on real rows",
        *(f"accuracy of {name}" for name in evaluation.readouts),
        *(f"block {index}: loss" for index in range(3)),
    }
    assert evaluation.rows > 300
    assert 0 < evaluation.also["frechet_distance of training rows"] < 2 < evaluation.value
    assert evaluation == Evaluation.from_json(evaluation.as_json())


class _Copyist(ImageSampler):
    """Draws training images of the labels asked for, or of those `shift` further on."""

    shift = 0

    def sample(self, count: int, labels: Sequence[int] | None = None, **how: object) -> Samples:
        assert self.model.plan.data is not None
        train = ShardSet.open(self.config.data.shards, "train")
        order = np.random.default_rng(0).permutation(train.rows)  # neighbours are by the same writer
        stored = train.gather("label", order)
        assert labels is not None
        rows, used = [], [0] * 10
        for asked in labels:
            label = (asked + self.shift) % 10
            rows.append(order[np.flatnonzero(stored == label)[used[label]]])
            used[label] += 1
        images: Samples = train.gather("image", np.array(rows[:count])).transpose(0, 2, 3, 1)
        return images


def test_what_a_perfect_generator_reaches(model: AssembledModel, shards: ShardSet) -> None:
    """Training images are as near as training images are, and mislabelled ones are so as well."""
    right = wrong = _Copyist(model)
    exact = evaluate_images(right, shards, samples=359)
    assert exact.value == pytest.approx(exact.also["frechet_distance of training rows"], abs=0.3)
    assert exact.also["accuracy of heun_5"] > 0.95
    wrong.shift = 1
    mistaken = evaluate_images(wrong, shards, samples=359)
    assert mistaken.value == pytest.approx(exact.value, abs=0.5)
    assert mistaken.also["accuracy of heun_5"] < 0.05


def test_evaluation_repeats_and_tells_its_progress(
    model: AssembledModel, shards: ShardSet, evaluation: Evaluation
) -> None:
    told: list[tuple[int, int]] = []
    torch.manual_seed(8)
    again = evaluate_images(
        ImageSampler(model), shards, samples=200, progress=lambda done, total: told.append((done, total))
    )
    assert again == evaluation
    assert told == sorted(told)
    assert told[-1] == (600, 600)


def test_losses_of_blocks_by_hand(model: AssembledModel, shards: ShardSet, evaluation: Evaluation) -> None:
    """The mean over the block's own range and all rows, at other noise: equal up to chance."""
    (batch,) = shuffled_rows(shards, SCALE, shards.rows, CPU)
    source = torch.Generator().manual_seed(5)
    distribution = NoiseDistribution.from_config(model.config.noise)
    with torch.inference_mode():
        for index, own in enumerate(model.ranges):
            sigma = distribution.sample(own, shards.rows, source)
            z = batch["image"] + sigma.view(-1, 1, 1, 1) * torch.randn(batch["image"].shape, generator=source)
            estimate = model.modules[index](z, sigma, batch["label"])
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            loss = (weight * (estimate - batch["image"]).square().mean(dim=(1, 2, 3))).mean()
            assert evaluation.also[f"block {index}: loss"] == pytest.approx(loss.item(), rel=0.15)


def test_baseline_is_measured_on_the_same_ranges(small_config: SmallConfig, shards: ShardSet, tmp_path: Path) -> None:
    config = small_config(model={"family": "dit"}, training={"steps": 2}, chain={"steps": 6, "solver": "euler"})
    result = evaluate_images(ImageSampler(image_model(config, tmp_path / "run", "end_to_end")), shards, samples=50)
    assert result.kind == "end_to_end"
    assert set(result.readouts) == {"euler_6", "heun_3", "heun_6"}
    assert [name for name in result.also if name.endswith("loss")] == [f"block {index}: loss" for index in range(3)]


class OwnCutConfig(DiTConfig):
    family: Literal["own_cut"] = "own_cut"  # type: ignore[assignment]


class OwnCutFamily(DiTFamily):
    """Two ranges, whatever `blocks` says."""

    name = "own_cut"

    def cut(self, config: RunConfig) -> list[Piece]:
        ranges = [NoiseRange(low=2.0, high=80.0), NoiseRange(low=0.002, high=2.0)]
        return [Piece((index, index + 1), own, own, 1) for index, own in enumerate(ranges)]


register(OwnCutFamily())


@pytest.mark.parametrize("kind", ["blocks", "end_to_end"])
def test_losses_of_a_family_that_cuts_its_own_way(
    small_config: SmallConfig, shards: ShardSet, tmp_path: Path, kind: Kind
) -> None:
    config = small_config(model={"family": "own_cut", "depth": 2}, blocks={"count": 1}, training={"steps": 2})
    losses = block_losses(ImageSampler(image_model(config, tmp_path / "run", kind)), shards, SCALE)
    assert list(losses) == ["block 0: loss", "block 1: loss"]


def test_unlabelled_latents_are_measured_too(small_config: SmallConfig, tmp_path: Path) -> None:
    """A denoiser that is exact for Gaussian data reaches the distance of the training rows."""
    folder = latent_shards(tmp_path)
    config = small_config(
        model={"family": "dit", "image_size": 4, "channels": 2, "patch_size": 2, "num_classes": None},
        data={"source": "latents", "path": str(folder), "augment": {}},
        optimiser={"lr": 1e-6},
        training={"steps": 1},
        chain={"steps": 18},
    )
    sampler = ImageSampler(image_model(config, tmp_path / "run"))
    result = evaluate_images(sampler, ShardSet.open(folder, "test"), samples=180)
    assert result.value < 2 * result.also["frechet_distance of training rows"]
    assert not any(name.startswith("accuracy") for name in result.also)
