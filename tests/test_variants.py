"""Ideas that are no options: each can be put in place, trains, is evaluated, and is not what is trained without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import variants
import yaml
from quality import train_one
from small_families import raw_config

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config, parse_config
from dbtrain.diffusion.codebook import make_codebook
from dbtrain.errors import UserError
from dbtrain.models.vit import ViTBlock
from dbtrain.plan import NoiseRange
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


def test_the_analytic_hint_is_the_density_of_the_noisy_code(
    small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = NoiseRange(high=80.0, low=0.002)
    module = ViTBlock(small_config(), 1, trained, trained, make_codebook(10, 16, 1.0, seed=7)).eval()
    generator = torch.Generator().manual_seed(0)
    image, label, sigma = torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 10, torch.rand(64) + 0.5
    z = module.codebook[label] + sigma[:, None] * torch.randn(64, module.codebook.shape[1], generator=generator)
    without = module(image, z, sigma)
    monkeypatch.setattr(variants, "_replace", monkeypatch.setattr)
    variants.analytic_hint()
    added = (module(image, z, sigma) - without).log_softmax(dim=-1)
    distance = torch.cdist(z, module.codebook).square()
    expected = (-distance / (2 * sigma[:, None] ** 2)).log_softmax(dim=-1)  # Bayes, with every label as likely
    torch.testing.assert_close(added, expected, atol=1e-4, rtol=1e-4)


def test_codes_of_neighbours(topics: Path) -> None:
    config = parse_config(raw_config("causal_lm", topics))
    codes, seen = variants._bigram_codes(config), variants._neighbours(config).sum(dim=1) > 0
    assert 20 < int(seen.sum()) < 257
    assert torch.allclose(codes.norm(dim=1), torch.ones(257), atol=1e-5)
    assert torch.equal(codes[~seen], make_codebook(257, 16, 1.0, config.seed)[~seen])
    # Digits stand beside the same bytes as other digits, and vowels beside others.
    alike = codes @ codes.T
    assert alike[ord("3"), ord("4")] > alike[ord("3"), ord("e")]


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
