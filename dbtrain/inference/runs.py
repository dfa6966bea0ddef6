"""From a run directory to its model, assembled if it is not yet, and to its evaluation, made once and remembered."""

from __future__ import annotations

import json
from typing import Any

import torch

from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.hub import fetch_model
from dbtrain.assembly.loading import AssembledModel, load_model
from dbtrain.data.manifest import Split
from dbtrain.hub import on_hub
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.evaluation import Evaluation, Progress
from dbtrain.run_directory import EVALUATION, PLAN, RunDirectory
from dbtrain.storage import Storage
from dbtrain.training.checkpoint import checkpoint_steps

VERSION = 3
"""Of what evaluations say: 2 since `product` is a pool, and classifiers have calibration and `without`; 3 since steps
of the chain say what all of them do so far."""


def model_of(run: RunDirectory, device: str | torch.device = "cpu") -> AssembledModel:
    """The run's model; a finished run is assembled first if it was not yet, or if its chain settings have changed.

    A model that was assembled from unfinished blocks stays until the run is finished.

    Raises:
        UserError: the run is unfinished.
        CorruptData: its checkpoints or its model are damaged.
    """
    if not run.storage.exists("model/model.safetensors"):
        assemble(run)
    model = load_model(run.uri, device)
    finished = all(checkpoint_steps(run.block(b.index))[-1:] == [run.plan.steps] for b in run.plan.blocks)
    # The chain is not part of the run's identity: `train` may have renewed it.
    if model.config.chain != run.config.chain or (model.partial and finished):
        assemble(run, model.weights, partial=not finished)
        model = load_model(run.uri, device)
    return model


def model_at(path: str, device: str | torch.device = "cpu") -> AssembledModel:
    """The model of the run directory at `path`, as `model_of` finds it, the model folder there, or `hf:owner/name`.

    Raises:
        UserError: there is none of them, the run is unfinished, or there is no such device.
        CorruptData: its files are damaged or do not belong together.
    """
    if on_hub(path):
        return load_model(path, device, fetch_model(path))
    storage = Storage.open(path)
    if storage.exists(PLAN) and not storage.exists("model.safetensors"):
        return model_of(RunDirectory.open(storage), device)
    return load_model(path, device)


def evaluation_of(
    run: RunDirectory,
    *,
    device: str = "cpu",
    split: Split = "test",
    data: str | None = None,
    judge: RunDirectory | None = None,
    renew: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """The evaluation of the run's model on `split`, from `evaluation.json` if it is of that model and split.

    One that was made when evaluations said less, or something else by the same name, is made again.

    `data` is the folder of the shards where they are not where the run's configuration says; `judge` is an end-to-end
    run that scores what a model of text writes.

    Raises:
        UserError: the run is unfinished, or the data it was trained on is gone.
        CorruptData: its checkpoints or its model are damaged.
    """
    model = model_of(run, device)
    judging = None if judge is None else model_of(judge, device)
    chain = model.config.chain.model_dump(mode="json")
    key = {"sha256": model.sha256, "split": split, "chain": chain, "version": VERSION}
    if judging is not None:
        key["judge"] = judging.sha256
    if not renew and (known := _kept(run, key)) is not None:
        return known
    result = evaluate(model, split, data=data, judge=judging, progress=progress)
    kept = {"of": key, "evaluation": result.as_json()}
    run.storage.write_atomic(EVALUATION, json.dumps(kept, indent=2).encode())
    return result


def evaluation_known(run: RunDirectory, model_sha256: str) -> Evaluation | None:
    """The evaluation that is remembered of that model, read as the run's chain settings say; none is made."""
    chain = run.config.chain.model_dump(mode="json")
    return _kept(run, {"sha256": model_sha256, "chain": chain, "version": VERSION})


def evaluation_at(path: str, model: AssembledModel) -> Evaluation | None:
    """What the run directory at `path` remembers of the evaluation of `model`, on whichever split; none elsewhere."""
    if on_hub(path) or not (storage := Storage.open(path)).exists(PLAN):
        return None
    return evaluation_known(RunDirectory.open(storage), model.sha256)


def _kept(run: RunDirectory, key: dict[str, Any]) -> Evaluation | None:
    """The remembered evaluation of `key`; a file that cannot be read is as good as none, for it can be made again."""
    try:
        kept = json.loads(run.storage.read_bytes(EVALUATION))
        return Evaluation.from_json(kept["evaluation"]) if key.items() <= dict(kept["of"]).items() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
