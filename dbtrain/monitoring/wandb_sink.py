"""W&B: one run a block, grouped by the run's name, and one for the assembled model with its evaluation.

Nothing is asked on a terminal, nothing but what is listed here is collected, and offline nothing goes over the network.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Before the import, which reads them: an outer run of W&B's, if there is one, is not ours, and nobody's report on
# errors is sent.
os.environ.pop("WANDB_SERVICE", None)
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb

from dbtrain.monitoring.plain_text import without_keys
from dbtrain.monitoring.run_view import RunView
from dbtrain.orchestration.state import BlockState
from dbtrain.run_directory import EVALUATION, RunDirectory
from dbtrain.storage import Storage


class WandbSink:
    """A W&B run for every block that tells something, see `dbtrain.monitoring.forward.Sink`."""

    def __init__(self, run: RunDirectory, id: str):
        self._run = run
        self._id = id
        self._runs: dict[int, wandb.Run] = {}

    def log(self, block: int, step: int, when: float, values: Mapping[str, float]) -> None:
        """One row of the block's history."""
        if block not in self._runs:
            self._runs[block] = self._start(block)
        self._runs[block].log({**values, "_timestamp": when}, step=step, commit=True)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self, view: RunView) -> None:
        """Say how each block ended, and wait until everything is sent."""
        for index, run in self._runs.items():
            block = view.blocks[index]
            run.summary.update({"state": block.state.value, "restarts": block.restarts, "rollbacks": block.rollbacks})
            run.finish(exit_code=int(block.state is BlockState.FAILED))

    def _start(self, block: int) -> wandb.Run:
        layout = self._run.plan.blocks[block]
        kind = "block" if self._run.plan.kind == "blocks" else "end_to_end"
        name = f"block-{block:02d}" if kind == "block" else "end-to-end"
        return _start_run(self._run, f"{self._id}-{block:02d}", name, kind, {"block": layout.model_dump(mode="json")})


def log_assembly(run: RunDirectory, id: str) -> None:
    """The run's newest evaluation as the summary of a W&B run of its own, and its model as an artifact.

    Raises:
        OSError: there is no evaluation, or no model.
    """
    kept = json.loads(run.storage.read_bytes(EVALUATION))
    about = json.loads(run.storage.read_bytes("model/config.json"))
    evaluation = {name: value for name, value in kept["evaluation"].items() if value not in ((), [], {})}
    with (
        tempfile.TemporaryDirectory() as temporary,
        _start_run(run, f"{id}-assembly", "assembly", "assembly", {"evaluated": kept["of"]}) as logged,
    ):
        logged.summary.update(dict(_flat("evaluation", evaluation)))
        model = wandb.Artifact(
            f"{run.config.name}-model",
            type="model",
            metadata={name: about[name] for name in ("sha256", "weights", "steps")},
        )
        online = run.config.monitoring.wandb == "online"
        folder = _local_copy(run.storage.sub("model"), Path(temporary))
        # Offline it is sent some day, when there may be another model: W&B keeps a copy.
        model.add_dir(str(folder), policy="immutable" if online else "mutable")
        logged.log_artifact(model)


def _start_run(run: RunDirectory, id: str, name: str, kind: str, more: Mapping[str, Any]) -> wandb.Run:
    wanted = run.config.monitoring
    folder = os.environ.get("WANDB_DIR") or run.storage.local_path or Path.cwd()
    # W&B puts the models it is given aside; in the home folder, if it is not told otherwise.
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(folder) / "wandb" / "data"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(Path(folder) / "wandb" / "cache"))
    online = wanted.wandb == "online"
    return wandb.init(
        project=wanted.wandb_project,
        entity=wanted.wandb_entity,
        id=id,
        name=f"{run.config.name}/{name}",
        group=run.config.name,
        job_type=kind,
        config=without_keys({**run.config.model_dump(mode="json"), "run": run.uri, **more}),
        dir=str(folder),
        mode="online" if online else "offline",
        resume="allow" if online else None,
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        ),
    )


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested figures under names such as evaluation/readouts/first."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flat(f"{name}/{index}", inner)
    else:
        yield name, value


def _local_copy(model: Storage, temporary: Path) -> Path:
    """The model folder, or a copy of it where it is not on this machine."""
    if model.local_path is not None:
        return model.local_path
    for name in model.list():
        with (temporary / name).open("wb") as file:
            file.writelines(model.read_pieces(name))
    return temporary
