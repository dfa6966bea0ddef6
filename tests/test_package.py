"""The package as a whole: what importing costs, what works without Ray, valid recipes, files that stay small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dbtrain
from dbtrain.config_file import load_config, parse_config
from dbtrain.training.planner import make_plan

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))

WITHOUT_RAY = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoRay())
"""


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=110, check=False
    )


def test_importing_is_cheap() -> None:
    names = "{name.partition('.')[0] for name in sys.modules}"
    done = _python(
        f"{WITHOUT_RAY}\nimport dbtrain\nassert dbtrain.__version__\nassert dbtrain.UserError\n"
        f"import json; print(json.dumps(sorted({names} & {{'torch', 'ray', 'numpy', 'pyarrow', 'pydantic'}})))"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_public_names() -> None:
    assert set(dbtrain.__all__) == {"CorruptData", "UserError", "__version__", "load"}
    assert all(hasattr(dbtrain, name) for name in dbtrain.__all__)
    with pytest.raises(dbtrain.UserError, match="holds no assembled model"):
        dbtrain.load("no/such/model")


def test_everything_but_the_ray_backend_works_without_ray(digits: Path, tmp_path: Path) -> None:
    changes = [f"data.path={digits}", "training.steps=4", "schedule.warmup_steps=1", "model.width=16"]
    path = tmp_path / "tiny.yaml"
    path.write_text(load_config(ROOT / "configs/demo/vit.yaml", changes).to_yaml())
    code = f"""{WITHOUT_RAY}
import dbtrain.training.trainer, dbtrain.orchestration.run
from dbtrain.cli.main import app, run as carry_out
config, run = sys.argv[1:]
app(["plan", config, "--json"], standalone_mode=False)
app(["train", config, "--run", run, "--backend", "inline", "--json"], standalone_mode=False)
app(["evaluate", run, "--json"], standalone_mode=False)
assert carry_out(["train", config, "--run", run + "-ray", "--backend", "ray"]) == 2
assert not any(name.partition(".")[0] == "ray" for name in sys.modules)
"""
    done = _python(code, str(path), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "--backend = 'ray': Ray is not installed here" in done.stderr
    assert not (tmp_path / "run-ray").exists()
    plan, trained, evaluated = map(json.loads, done.stdout.splitlines())
    assert [block["index"] for block in plan["blocks"]] == [0, 1, 2]
    assert [(block["state"], block["step"]) for block in trained["blocks"]] == [("finished", 4)] * 3
    assert set(evaluated["readouts"]) >= {"first", "last", "product"}


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(ROOT)) for path in RECIPES])
def test_recipes_are_valid(path: Path) -> None:
    config = load_config(path)
    plan = make_plan(config)
    assert plan.blocks[-1].layers[1] == config.model.depth
    assert plan.layer_evaluations == make_plan(config, "end_to_end").layer_evaluations
    assert parse_config(config.model_dump(mode="json")) == config


def test_names_that_scripts_rely_on() -> None:
    assert {"configs/demo/vit.yaml", "configs/vit-cifar100.yaml"} <= {str(path.relative_to(ROOT)) for path in RECIPES}


def test_long_files_say_why() -> None:
    """Over 400 lines, the head of the file has to give a reason, as `Length: ...`."""
    files = [path for name in ("dbtrain", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 50
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").splitlines() for path in files}
    too_long = {name for name, text in lines.items() if len(text) > 400 and "Length:" not in "\n".join(text[:30])}
    assert too_long == set()
