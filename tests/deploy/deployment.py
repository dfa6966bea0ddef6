"""What the tests of `cluster/` and `launch/` share: where the files are, and how they are read."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = ["cluster/local.sh", "launch/slurm.sbatch"]
RAY_UP = ["cluster/on-premises.yaml", "cluster/aws.yaml"]
TOOLS = Path(sys.executable).parent
"""Where shellcheck, hadolint, ray and dbtrain are."""


def text(name: str) -> str:
    """A file of the checkout."""
    return (ROOT / name).read_text()


def manifest(name: str) -> dict[str, Any]:
    """A YAML file of the checkout."""
    loaded: dict[str, Any] = yaml.safe_load(text(name))
    return loaded


def pyproject() -> dict[str, Any]:
    """The table `project` and what else there is."""
    return tomllib.loads(text("pyproject.toml"))


def files_to_install() -> set[str]:
    """What `pip install` of a checkout reads of it."""
    project = pyproject()
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], *packages}


def complaints(tool: str, *arguments: str, given: str = "") -> str:
    """What a linter has to say; nothing if it is content."""
    done = subprocess.run(
        [str(TOOLS / tool), *arguments], input=given, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    return done.stdout + done.stderr if done.returncode else ""


def processes_with(mark: str) -> dict[int, str]:
    """Process ids and command lines of those that have a variable beginning with `mark` in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            line = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # gone meanwhile, or somebody else's
        if line and any(variable.startswith(mark.encode()) for variable in variables):
            found[int(folder.name)] = line
    return found
