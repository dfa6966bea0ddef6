"""Ensembles of `benchmarks/ensemble.py`: the answers of end-to-end networks, pooled and averaged."""

from __future__ import annotations

from pathlib import Path

import ensemble
import numpy as np
import pytest
import torch
import yaml
from quality import train_one
from small_families import raw_config

from dbtrain.config_file import load_config
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import EvalTransform
from dbtrain.errors import UserError
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.runs import model_at


@pytest.mark.slow
def test_networks_answer_together(digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    sections = {"training": {"steps": 12}, "schedule": {"warmup_steps": 2}, "optimiser": {"lr": 0.01}}
    recipe.write_text(yaml.safe_dump(raw_config("vit", digits, **sections)))
    paths = [str(tmp_path / f"seed{seed}") for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        train_one(load_config(recipe, [f"seed={seed}"]), "end_to_end", Path(path))
    models = [model_at(path) for path in paths]
    alone = [evaluate(model).value for model in models]
    assert ensemble.accuracies([paths[0]]) == pytest.approx(
        dict.fromkeys(("alone", "product", "mean of probabilities"), alone[0])
    )

    together = ensemble.accuracies(paths)
    assert together["alone"] == pytest.approx(sum(alone) / 2)
    shards, facts = ShardSet.open(digits, "test"), models[0].plan.data
    assert facts is not None
    rows = np.arange(shards.rows)
    raw = {name: torch.from_numpy(shards.gather(name, rows)) for name in ("image", "label")}
    batch = EvalTransform(facts.mean, facts.std)(raw, rows)
    with torch.inference_mode():
        said = torch.stack([model.modules[0](batch["image"]) for model in models]).double()

    def accuracy(answers: torch.Tensor) -> float:
        return float((answers.argmax(dim=-1) == batch["label"]).double().mean())

    assert together["product"] == pytest.approx(accuracy(said.log_softmax(dim=-1).sum(dim=0)))
    assert together["mean of probabilities"] == pytest.approx(accuracy(said.softmax(dim=-1).sum(dim=0)))

    train_one(load_config(recipe), "blocks", tmp_path / "blocks")
    drawing = tmp_path / "drawing.yaml"
    drawing.write_text(yaml.safe_dump(raw_config("dit", digits, **sections)))
    train_one(load_config(drawing), "end_to_end", tmp_path / "dit")
    for other in ("blocks", "dit"):
        with pytest.raises(UserError, match="no end-to-end classifier"):
            ensemble.accuracies([paths[0], str(tmp_path / other)])
