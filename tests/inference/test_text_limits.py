"""Options of writing text that no model can follow: one message each, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from masked_lm_runs import SECTIONS, trained_model
from text_models import small_language_model

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.unmask import TextUnmasker


@pytest.fixture(scope="module", params=["blocks", "end_to_end"])
def generator(request: pytest.FixtureRequest, topics: Path, tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    run = tmp_path_factory.mktemp("runs") / "run"
    return TextGenerator(small_language_model(topics, run, request.param))


@pytest.fixture(scope="module")
def unmasker(family_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> TextUnmasker:
    config = family_config("masked_lm", **SECTIONS)
    return TextUnmasker(trained_model(config, tmp_path_factory.mktemp("masked") / "run"))


@pytest.mark.parametrize("seed", [-1, 2**63, 10**60])
def test_seeds_are_those_of_runs_and_images(generator: TextGenerator, unmasker: TextUnmasker, seed: int) -> None:
    for write in (
        lambda: generator.generate("The ", seed=seed),
        lambda: unmasker.generate(seed=seed),
        lambda: unmasker.infill(["The ", 3], seed=seed),
    ):
        with pytest.raises(UserError, match=rf"--seed = {seed}: has to be from 0 to 2\*\*63 - 1"):
            write()


def test_the_greatest_seed(generator: TextGenerator, unmasker: TextUnmasker) -> None:
    assert generator.generate("The ", seed=2**63 - 1) != generator.generate("The ", seed=2**63 - 2)
    assert unmasker.generate(steps=2, seed=2**63 - 1) != unmasker.generate(steps=2, seed=2**63 - 2)


@pytest.mark.parametrize("steps", [10**5 + 1, 10**20])
def test_steps_that_would_never_end(unmasker: TextUnmasker, generator: TextGenerator, steps: int) -> None:
    writes = [lambda: unmasker.generate(steps=steps), lambda: unmasker.infill(["The ", 3], steps=steps)]
    if not generator.model.end_to_end:
        writes.append(lambda: generator.generate("The ", steps=steps))
    for write in writes:
        with pytest.raises(UserError, match=f"--steps = {steps}: has to be at most 100000"):
            write()


def test_bytes_that_are_not_utf8(generator: TextGenerator, unmasker: TextUnmasker) -> None:
    """What a shell hands over as it is comes as halves of surrogate pairs."""
    with pytest.raises(UserError, match=r"^--prompt: holds half of a surrogate pair at character 1"):
        generator.generate(["good", "a\udce9"])
    with pytest.raises(UserError, match=r"^--infill: holds half of a surrogate pair at character 2"):
        unmasker.infill(["good", 3, "ab\udce9"])
