"""The files for `ray up`, held against Ray's own checks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from deployment import RAY_UP, ROOT, complaints, files_to_install, manifest
from jsonschema import ValidationError

COMMANDS = ["setup_commands", "head_start_ray_commands", "worker_start_ray_commands"]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_accepts_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = manifest(name)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["max_workers"] == sum(
        kind["min_workers"] for kind in prepared["available_node_types"].values() if kind["min_workers"]
    ), "dbtrain asks for no more than fits: an autoscaler would leave workers unstarted"
    if config["provider"]["type"] == "aws":
        assert prepared["head_node_type"] in prepared["available_node_types"]
        assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_ray_refuses_what_is_wrong() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = manifest(RAY_UP[0])
    config["setup_command"] = config.pop("setup_commands")
    with pytest.raises(ValidationError, match="'setup_command' was unexpected"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", RAY_UP)
def test_what_is_copied_can_be_installed(name: str) -> None:
    mounts: dict[str, str] = manifest(name)["file_mounts"]
    local = {there: here for there, here in mounts.items() if not here.startswith("~")}
    for there, here in local.items():
        assert there == f"~/dbtrain/{here}"
        assert (ROOT / here).exists()
    assert files_to_install() | {"requirements.txt"} <= set(local.values())


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_has_the_token(name: str) -> None:
    config = manifest(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    assert "'export RAY_AUTH_MODE=token'" in config["setup_commands"][-1]
    for command in ray_commands(config):
        assert command.startswith(". ~/dbtrain.env; ")


@pytest.mark.parametrize("name", RAY_UP)
def test_shell_commands(name: str) -> None:
    # SC1090: the file is made on the node; SC2016: it is meant to have the variables in it, not their values here.
    for key in COMMANDS:
        for command in manifest(name)[key]:
            assert complaints("shellcheck", "--shell=bash", "--exclude=SC1090,SC2016", "-", given=f"{command}\n") == ""


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_start_knows_the_options(name: str) -> None:
    from ray.scripts.scripts import start

    starts = [command for command in ray_commands(manifest(name)) if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        arguments = shlex.split(re.sub(r"\$\w+", "there", command.partition("ray start ")[2]))
        given: dict[str, Any] = start.make_context("start", arguments).params
        assert given["head"] or given["address"] == "there:6379"
        if given["head"]:
            # `ray dashboard` makes a tunnel to the loopback address.
            assert given["dashboard_host"] in ("localhost", "127.0.0.1")
            assert given["port"] == 6379
            assert Path(given["autoscaling_config"]).name == "ray_bootstrap_config.yaml"


def ray_commands(config: dict[str, Any]) -> list[str]:
    return [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
