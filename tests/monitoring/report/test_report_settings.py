from __future__ import annotations

from collections.abc import Callable

import pytest
from small_families import MODELS

from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.monitoring.report.settings import settings

FamilyConfig = Callable[..., RunConfig]


@pytest.mark.parametrize("family", MODELS)
def test_every_field_stands_there_once(family: str, family_config: FamilyConfig) -> None:
    config = family_config(family)
    found = settings(config)

    def leaves(plain: dict[str, object], prefix: str = "") -> list[str]:
        names = []
        for name, value in plain.items():
            section = isinstance(value, dict) and name not in ("custom",)
            names += leaves(value, f"{prefix}{name}.") if section else [prefix + name]  # type: ignore[arg-type]
        return names

    assert [setting.field for setting in found] == leaves(config.model_dump(mode="json"))
    assert all(setting.about for setting in found)


@pytest.mark.parametrize("family", MODELS)
def test_what_is_given_differs_and_nothing_else(family: str, family_config: FamilyConfig) -> None:
    config = family_config(family)
    chosen = {setting.field: setting for setting in settings(config) if setting.chosen}
    # Left at the general default, at the family's default, and set by the test.
    assert "optimiser.lr" not in chosen
    assert ("noise.weight" in chosen, "blocks.overlap" in chosen) == (False, False)
    assert chosen["training.batch_size"].value == "16"
    assert chosen["training.batch_size"].default == "128"
    assert chosen["training.steps"].default is None  # has to be given
    assert chosen["data.path"].default == "none"
    assert config.chain.steps is None or chosen["chain.steps"].default != chosen["chain.steps"].value


def test_a_default_that_was_written_out_is_no_choice(family_config: FamilyConfig) -> None:
    raw = family_config("dit").model_dump(mode="json")
    raw["noise"]["weight"], raw["chain"]["steps"] = "edm", 18
    assert not {"noise.weight", "chain.steps"} & {s.field for s in settings(parse_config(raw)) if s.chosen}
    raw["noise"]["weight"] = "unit"  # the general default, which is not this family's
    [weight] = [s for s in settings(parse_config(raw)) if s.field == "noise.weight"]
    assert (weight.chosen, weight.default) == (True, "edm")
