"""Reading a model folder back: verified, built, ready for inference."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from dbtrain.assembly.assemble import FORMAT, Weights
from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.diffusion.codebook import digest
from dbtrain.errors import CorruptData, UserError
from dbtrain.models import TrainableModule, family_of
from dbtrain.plan import NoiseRange, Plan
from dbtrain.run_directory import TOKENIZER
from dbtrain.storage import Storage
from dbtrain.training.device import inference_device
from dbtrain.training.planner import build_module


@dataclass(frozen=True)
class AssembledModel:
    """An assembled network: its blocks in order (a baseline has one), in evaluation mode, on one device."""

    config: RunConfig
    plan: Plan
    modules: tuple[TrainableModule, ...]
    codebook: Tensor | None
    """(classes, width); none for an end-to-end network."""
    weights: Weights
    steps: tuple[int, ...]
    """Steps of each block when they were assembled."""
    sha256: str
    device: torch.device
    tokenizer: bytes | None
    """Content of the tokenizer's file, for models of text."""

    @property
    def ranges(self) -> list[NoiseRange]:
        """The blocks' own noise ranges, highest first; none for an end-to-end network."""
        return [block.noise for block in self.plan.blocks if block.noise is not None]

    @property
    def end_to_end(self) -> bool:
        """Whether this is the baseline."""
        return self.plan.kind == "end_to_end"

    @property
    def partial(self) -> bool:
        """Whether some block was not trained to its end."""
        return min(self.steps) < self.plan.steps


def load_model(path: str, device: str | torch.device = "cpu", folder: str | None = None) -> AssembledModel:
    """Load the model folder at `path`, or the `model` folder of the run directory at `path`.

    Errors speak of `path`, also where a `folder` is given that was fetched from there.

    Raises:
        UserError: there is no assembled model at `path`, or no such device.
        CorruptData: its files are damaged or do not belong together.
    """
    where = inference_device(device)
    storage = Storage.open(folder or path)
    if not storage.exists("model.safetensors") and storage.exists("model/model.safetensors"):
        storage = storage.sub("model")
    if not storage.exists("model.safetensors") or not storage.exists("config.json"):
        mend = "run `dbtrain assemble` on it first" if storage.exists("plan.json") else None
        raise UserError("holds no assembled model", field="path", value=path, mend=mend)
    about = _read_about(storage, path)
    data = storage.read_bytes("model.safetensors")
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise CorruptData("model.safetensors is not the file that config.json describes", field="path", value=path)
    tensors = safetensors.torch.load(data)
    config, plan = about["config"], about["plan"]
    codebook = tensors.pop("codebook", None)
    if plan.codebook_sha256 is not None and (codebook is None or digest(codebook) != plan.codebook_sha256):
        raise CorruptData("the codebook is not the one of the plan", field="path", value=path)
    try:
        modules = _build(config, plan, codebook, tensors, where)
    except RuntimeError as error:  # names or shapes differ
        raise CorruptData(
            "holds other weights than this version of the network that config.json describes has",
            field="path",
            value=path,
            mend="load it with the version of dbtrain that assembled it, or train anew",
        ) from error
    return AssembledModel(
        config=config,
        plan=plan,
        modules=modules,
        codebook=None if codebook is None else codebook.to(where),
        weights=about["weights"],
        steps=tuple(about["steps"]),
        sha256=about["sha256"],
        device=where,
        tokenizer=storage.read_bytes(TOKENIZER) if storage.exists(TOKENIZER) else None,
    )


def _read_about(storage: Storage, path: str) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(storage.read_bytes("config.json"))
        found = about["format"]
    except (ValueError, KeyError, TypeError):
        raise CorruptData("config.json is not that of a model", field="path", value=path) from None
    if found != FORMAT:
        raise UserError(f"model folder of format {found}; this version reads {FORMAT}", field="path", value=path)
    try:
        about["config"] = parse_config(about["config"])
        about["plan"] = Plan.model_validate(about["plan"])
        about.setdefault("steps", [about["plan"].steps] * len(about["plan"].blocks))
        about = {name: about[name] for name in ("config", "plan", "weights", "steps", "sha256")}
    except (KeyError, TypeError, ValidationError, UserError) as error:
        raise CorruptData(f"config.json is damaged: {type(error).__name__}", field="path", value=path) from error
    return about


def _build(
    config: RunConfig, plan: Plan, codebook: Tensor | None, tensors: dict[str, Tensor], device: torch.device
) -> tuple[TrainableModule, ...]:
    family = family_of(config)
    modules = []
    for block in plan.blocks:
        # The first weights are drawn in vain; the caller's random numbers stay as they were.
        with torch.random.fork_rng(devices=[]):
            module = build_module(family, config, block.layers, block.trained, codebook)
        prefix = f"blocks.{block.index}."
        own = [name for name in tensors if name.startswith(prefix)]
        module.load_state_dict({name.removeprefix(prefix): tensors.pop(name) for name in own})
        modules.append(module.to(device).eval().requires_grad_(False))
    if tensors:
        raise RuntimeError(f"{len(tensors)} tensors of no block")
    return tuple(modules)
