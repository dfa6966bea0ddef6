"""docs/adding-a-family.md is followed to the letter: its module and its recipe, through the verbs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "adding-a-family.md"
SHORTER = ["--set", "training.steps=40", "--set", "model.width=32"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    text = GUIDE.read_text()
    for language, name in (("python", "mixer_family.py"), ("yaml", "mixer.yaml")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
        (tmp_path / name).write_text(block)
    return tmp_path


def dbtrain(place: Path, *arguments: object) -> dict[str, object]:
    command = [sys.executable, "-m", "dbtrain.cli.main", *map(str, arguments), "--json"]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_toy_family_of_the_guide_goes_through_every_verb(place: Path, digits: Path) -> None:
    assert len((place / "mixer_family.py").read_text().splitlines()) < 120
    data = ["--set", f"data.path={digits}"]
    planned = dbtrain(place, "plan", "mixer.yaml", *data)
    assert len(planned["blocks"]) == 3  # type: ignore[arg-type]
    for verb, run in (("train", "run"), ("baseline", "baseline")):
        dbtrain(place, verb, "mixer.yaml", "--run", run, "--backend", "inline", *data, *SHORTER)
    result = dbtrain(place, "evaluate", "run", "--baseline", "baseline")
    chance = 0.1
    assert result["readouts"]["product"] > 2 * chance  # type: ignore[index]
    assert result["baseline"]["readouts"]["accuracy"] > 2 * chance  # type: ignore[index]
    both = dbtrain(place, "compare", "run", "baseline")
    assert both["run"]["layer_evaluations"] == both["baseline"]["layer_evaluations"]  # type: ignore[index]


def test_a_module_that_is_no_family_is_the_users_mistake(place: Path) -> None:
    command = [sys.executable, "-m", "dbtrain.cli.main", "plan", "mixer.yaml", "--set", "model.family=json"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model.family = 'json': has to be one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_module_with_a_section_alone_is_the_users_mistake(place: Path) -> None:
    (place / "half.py").write_text(
        "from typing import Literal\nfrom dbtrain.model_config import ImageModelConfig\n\n\n"
        'class HalfConfig(ImageModelConfig):\n    data_kinds = ("image",)\n    family: Literal["half"] = "half"\n'
    )
    model = "model={family: half, image_size: 8, patch_size: 4, depth: 6, width: 16, heads: 2, mlp_width: 32}"
    command = [sys.executable, "-m", "dbtrain.cli.main", "plan", "mixer.yaml", "--set", model]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model.family = 'half': the module registers no family of that name" in done.stderr
    assert "Traceback" not in done.stderr
