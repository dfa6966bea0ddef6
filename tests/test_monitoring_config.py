from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config, parse_config
from dbtrain.errors import UserError
from dbtrain.run_directory import RunDirectory

SmallConfig = Callable[..., RunConfig]
CHANGED = {
    "wandb": "online",
    "wandb_project": "p",
    "wandb_entity": "e",
    "tensorboard": True,
    "prometheus": False,
    "patience": 3.0,
}


def test_who_is_told_is_no_part_of_what_a_run_is(small_config: SmallConfig) -> None:
    plain, told = small_config(), small_config(monitoring=CHANGED)
    assert CHANGED.keys() == type(plain.monitoring).model_fields.keys()
    assert told.digest() == plain.digest()
    assert "monitoring" not in plain.identity()


def test_a_run_directory_of_an_earlier_version_can_be_opened(small_config: SmallConfig, tmp_path: Path) -> None:
    start_run(small_config(), tmp_path)
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del kept["monitoring"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept))
    assert RunDirectory.open(tmp_path).config == small_config()


@pytest.mark.parametrize("written", ["off", "'off'"])
def test_off_is_what_yaml_takes_for_false(small_config: SmallConfig, tmp_path: Path, written: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(small_config(monitoring={"wandb": "offline"}).to_yaml())
    config = load_config(path, [f"monitoring.wandb={written}"])
    assert config.monitoring.wandb == "off"
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("field", "value"), [("wandb", "sometimes"), ("wandb", True), ("wandb_project", "a/b"), ("patience", 0)]
)
def test_mistakes_name_the_field(small_config: SmallConfig, field: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        small_config(monitoring={field: value})
    assert caught.value.field == f"monitoring.{field}"
