"""Runs trained in the test's own process, without any orchestration."""

from __future__ import annotations

from contextlib import closing
from functools import lru_cache
from pathlib import Path

from dbtrain.config import RunConfig
from dbtrain.data.manifest import Manifest
from dbtrain.plan import Kind, Plan
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import checkpoint_steps
from dbtrain.training.planner import make_plan
from dbtrain.training.progress import Progress
from dbtrain.training.trainer import BlockTrainer


@lru_cache(maxsize=32)
def _plan_of(text: str, kind: Kind) -> Plan:
    config = RunConfig.model_validate_json(text)
    return make_plan(config, kind, Manifest.load(config.data.shards).facts())


def start_run(config: RunConfig, where: str | Path, kind: Kind = "blocks") -> RunDirectory:
    """A new run directory, nothing trained."""
    return RunDirectory.create_or_resume(where, config, _plan_of(config.model_dump_json(), kind))


def train_block(run: RunDirectory, index: int = 0, attempt: int = 1) -> list[Progress]:
    """Train one block to its end."""
    with closing(BlockTrainer(run, index, attempt)) as trainer:
        return list(trainer.train())


def train_all(run: RunDirectory) -> RunDirectory:
    """Train every block."""
    for block in run.plan.blocks:
        train_block(run, block.index)
    return run


def newest_files(run: RunDirectory, index: int = 0) -> dict[str, bytes]:
    """The files of a block's newest checkpoint, without the manifest, which names the attempt."""
    storage = run.block(index).checkpoints
    folder = f"step-{checkpoint_steps(run.block(index))[-1]:08d}"
    return {name: storage.read_bytes(f"{folder}/{name}") for name in storage.list(folder) if name != "MANIFEST"}
