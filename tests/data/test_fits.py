"""Whether data goes with a configuration, and what its batches then look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.data.batches import make_transform
from dbtrain.data.fits import check_fits
from dbtrain.data.loader import BatchLoader, iterate_split
from dbtrain.data.order import SampleOrder
from dbtrain.data.prepare import ensure_prepared, prepare
from dbtrain.data.shards import ShardSet
from dbtrain.errors import UserError
from dbtrain.plan import DatasetFacts

IMAGES = DatasetFacts(
    sha256="0", kind="image", shape=(3, 6, 6), train_rows=9, test_rows=1, class_names=("a", "b"), mean=(0.4,) * 3,
    std=(0.2,) * 3, vocab_size=None, separator=None, tokenizer_sha256=None,
)  # fmt: skip
LATENTS = IMAGES.model_copy(update={"kind": "latent", "shape": (4, 6, 6), "mean": (3.0,) * 4, "std": (2.0,) * 4})
TEXT = IMAGES.model_copy(
    update={"kind": "text", "shape": (32,), "class_names": (), "mean": (), "std": (), "vocab_size": 257,
            "separator": 256, "tokenizer_sha256": "1"}
)  # fmt: skip

_WIDTHS = {"depth": 2, "width": 8, "heads": 2, "mlp_width": 8}


def run_config(family: str, data: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    fields: dict[str, dict[str, Any]] = {
        "vit": {"image_size": 6, "channels": 3, "num_classes": 2, "patch_size": 1},
        "dit": {"image_size": 6, "channels": 4, "num_classes": 2, "patch_size": 1},
        "masked_lm": {"length": 32, "vocab_size": 257},
    }
    return parse_config(
        {
            "name": "test",
            "model": {"family": family, **_WIDTHS, **fields[family], **model},
            "blocks": {"count": 2},
            "data": {"source": "mine", **(data or {})},
            "training": {"steps": 10},
        }
    )


@pytest.mark.parametrize(
    ("facts", "config"),
    [
        (IMAGES, run_config("vit")),
        (IMAGES, run_config("dit", channels=3)),
        (IMAGES, run_config("dit", channels=3, num_classes=None)),
        (LATENTS, run_config("dit")),
        (LATENTS.model_copy(update={"class_names": ()}), run_config("dit", num_classes=None)),
        (LATENTS.model_copy(update={"class_names": ()}), run_config("dit", num_classes=1)),
        (TEXT, run_config("masked_lm")),
    ],
)
def test_data_that_fits(facts: DatasetFacts, config: RunConfig) -> None:
    check_fits(facts, config)


@pytest.mark.parametrize(
    ("facts", "config", "field", "mend"),
    [
        (LATENTS, run_config("vit"), "model.family", "choose other data"),
        (TEXT, run_config("dit"), "model.family", "choose other data"),
        (IMAGES, run_config("masked_lm"), "model.family", "choose other data"),
        (LATENTS, run_config("dit", channels=3), "model.channels", "set model.channels=4"),
        (LATENTS, run_config("dit", image_size=8), "model.image_size", "set model.image_size=6"),
        (LATENTS, run_config("dit", num_classes=3), "model.num_classes", "set model.num_classes=2"),
        (TEXT, run_config("masked_lm", length=64), "model.length", "set model.length=32"),
        (TEXT, run_config("masked_lm", separator=0), "model.separator", "set model.separator=256"),
        (TEXT, run_config("masked_lm", vocab_size=256), "model.vocab_size", "set model.vocab_size=257"),
    ],
)
def test_data_that_does_not(facts: DatasetFacts, config: RunConfig, field: str, mend: str) -> None:
    with pytest.raises(UserError) as caught:
        check_fits(facts, config)
    assert caught.value.field == field
    assert mend in str(caught.value)


@pytest.mark.parametrize("augment", [{"flip": True}, {"crop_padding": 1}, {"randaugment": {"operations": 1}}])
@pytest.mark.parametrize(("facts", "family"), [(LATENTS, "dit"), (TEXT, "masked_lm")])
def test_distortions_are_for_images(facts: DatasetFacts, family: str, augment: dict[str, Any]) -> None:
    config = run_config(family, {"augment": augment})
    with pytest.raises(UserError, match="distorts images") as caught:
        check_fits(facts, config)
    assert caught.value.field == f"data.augment.{next(iter(augment))}"
    with pytest.raises(UserError, match="distorts images"):
        make_transform(config, facts, None, key=1)


def test_the_transform_of_each_kind() -> None:
    at = np.arange(5)
    pixels = torch.full((5, 3, 6, 6), 51, dtype=torch.uint8)
    config = run_config("dit", {"augment": {"crop_padding": 2}}, channels=3)
    plain = make_transform(config, IMAGES, None, key=None)({"image": pixels}, at)["image"]
    torch.testing.assert_close(plain, torch.full((5, 3, 6, 6), (0.2 - 0.4) / 0.2))
    halves = make_transform(config, IMAGES, ((0.5,) * 3, (0.5,) * 3), key=None)({"image": pixels}, at)["image"]
    torch.testing.assert_close(halves, torch.full((5, 3, 6, 6), -0.6))
    cropped = make_transform(config, IMAGES, ((0.5,) * 3, (0.5,) * 3), key=1)({"image": pixels}, at)["image"]
    assert cropped.min() == -1.0  # black from beyond the edge

    raw = torch.full((5, 4, 6, 6), 5.0, dtype=torch.float16)
    for key in (None, 1):
        scaled = make_transform(run_config("dit"), LATENTS, None, key)({"image": raw, "label": at}, at)  # type: ignore[dict-item]
        torch.testing.assert_close(scaled["image"], torch.ones(5, 4, 6, 6))
        assert scaled["label"] is at
        tokens = torch.tensor([[1, 256]], dtype=torch.uint16)
        found = make_transform(run_config("masked_lm"), TEXT, None, key)({"tokens": tokens}, at)["tokens"]
        assert found.dtype == torch.int64
        assert found.tolist() == [[1, 256]]


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_batches_of_text(tmp_path: Path, vocab_size: int) -> None:
    options: dict[str, Any] = {} if vocab_size == 257 else {"tokenizer": "bpe", "vocab_size": vocab_size}
    prepare("topics", tmp_path / "shards", length=32, **options)
    data_at, separator = {"path": str(tmp_path / "shards")}, 256 if vocab_size == 257 else 0
    config = run_config("masked_lm", data_at, vocab_size=vocab_size, separator=separator)
    facts = ensure_prepared(config).facts()
    data = ShardSet.open(tmp_path / "shards", "train")
    order = SampleOrder(data.rows, 0, block=1)
    batch = BatchLoader(data, order, make_transform(config, facts, None, key=3), 16).batch(5)
    assert list(batch) == ["tokens"]
    stored = data.gather("tokens", order.rows_at(5, 16)[1])
    assert np.array_equal(batch["tokens"], stored.astype(np.int64))
    test = ShardSet.open(tmp_path / "shards", "test")
    parts = list(iterate_split(test, make_transform(config, facts, None, None), 100))
    assert sum(len(part["tokens"]) for part in parts) == test.rows


def test_topics_are_cut_to_the_windows_of_the_model(tmp_path: Path) -> None:
    config = run_config("masked_lm", {"source": "topics", "path": str(tmp_path / "topics")}, length=48)
    assert ensure_prepared(config).facts().shape == (48,)
    with pytest.raises(UserError, match=r"set model\.length=48"):
        ensure_prepared(run_config("masked_lm", {"source": "topics", "path": str(tmp_path / "topics")}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_reach_the_gpu(tmp_path: Path) -> None:
    prepare("topics", tmp_path / "shards", length=32)
    config = run_config("masked_lm", {"path": str(tmp_path / "shards")})
    data = ShardSet.open(tmp_path / "shards", "train")
    order, transform = SampleOrder(data.rows, 0, 0), make_transform(config, data.manifest.facts(), None, 1)
    there = BatchLoader(data, order, transform, 16, "cuda").batch(0)["tokens"]
    assert torch.equal(there.cpu(), BatchLoader(data, order, transform, 16).batch(0)["tokens"])
