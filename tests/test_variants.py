"""Ideas that are no options: each can be put in place, trains, is evaluated, and is not what is trained without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import variants
import yaml
from quality import train_one
from small_families import raw_config

from dbtrain.config_file import load_config, parse_config
from dbtrain.errors import UserError
from dbtrain.run_directory import RunDirectory


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_trains_something_else(
    name: str,
    digits: Path,
    topics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family = variants.VARIANTS[name].family
    recipe = tmp_path / "recipe.yaml"
    raw = raw_config(
        family,
        digits if family == "vit" else topics,
        training={"steps": 12},
        schedule={"warmup_steps": 2},
        optimiser={"lr": 0.01},
        blocks={"relay_every": 4} if variants.VARIANTS[name].relays else {},
        logging={"every": 4},
    )
    recipe.write_text(yaml.safe_dump(raw))
    plain = train_one(load_config(recipe, ["seed=3"]), "blocks", tmp_path / "plain")
    command = ["variants.py", name, str(recipe), "--seeds", "3", "--runs", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", command)
        patched.setattr(variants, "_replace", patched.setattr)  # taken back at the end
        variants.main()
    assert f"{name}, 1 seeds" in capsys.readouterr().out
    other = RunDirectory.open(str(tmp_path / f"{name}-blocks-seed3"))
    losses = [[line["loss"] for line in run.block(2).metrics()] for run in (plain, other)]
    assert losses[0] != losses[1]
    assert all(loss > 0 for loss in losses[1])


@pytest.mark.parametrize(
    ("name", "family", "blocks", "field"),
    [
        ("codes-simplex", "masked_lm", {}, "model.family"),
        ("relay-without-belief", "vit", {}, "blocks.relay_every"),
        ("own-trajectory", "vit", {"relay_every": 4}, "blocks.relay_every"),
    ],
)
def test_a_recipe_that_it_does_not_change_is_refused(
    name: str, family: str, blocks: dict[str, int], field: str, tmp_path: Path
) -> None:
    config = parse_config(raw_config(family, tmp_path, blocks=blocks))
    with pytest.raises(UserError, match=field):
        variants.VARIANTS[name].check(config, "blocks")
    with pytest.raises(UserError):
        variants.VARIANTS["codes-random"].check(config, "end_to_end")
