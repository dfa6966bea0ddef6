"""An assembled model as a folder for others: weights as safetensors, config.json and a model card.

dbtrain   what `dbtrain.load` reads: the blocks, the codebook, and the chain through them. Of any family.
llama     what Hugging Face's Llama loads: one plain forward pass (`dbtrain.assembly.llama`). Of `causal_lm` alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
from torch import Tensor

from dbtrain.assembly.assemble import Weights, describe_model
from dbtrain.assembly.card import Beside, dbtrain_card, llama_card
from dbtrain.assembly.llama import about_llama, clean_weights, describe, json_file, tokenizer_files
from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.model_config import CausalLMConfig
from dbtrain.models.pretrained import HEAD
from dbtrain.monitoring_config import MonitoringConfig
from dbtrain.run_directory import TOKENIZER
from dbtrain.storage import LocalStorage, temporary_name

Format = Literal["dbtrain", "llama"]

_MEND = "choose a new or empty folder"


@dataclass(frozen=True)
class Exported:
    """What `export` made."""

    path: str
    format: Format
    weights: Weights
    """Averaged or last ones, as the run was assembled."""
    clean_path: bool
    """Whether it is the clean path of denoising blocks; otherwise it is the model itself."""
    parameters: int
    bytes: int
    """Of model.safetensors."""
    sha256: str
    """Of model.safetensors; in our own format that of the run's model."""
    tokenizer: bool
    """Whether the folder has a tokenizer; in Llama's format tokens that are bytes have none."""


def export(
    model: AssembledModel,
    out: str | Path,
    format: Format | None = None,
    beside: Beside | None = None,
) -> Exported:
    """Write an assembled model into the folder `out` of this machine.

    A text goes into a Llama as it goes into ours: first the document separator (bos_token_id in config.json), which the
    exported tokenizer puts there, then the tokens.

    A new folder appears under its name complete. One that is there is filled in place, since it may be a mount point or
    the working directory; config.json comes last, and without it nobody takes the rest for a model.

    Args:
        format: `llama` for a `causal_lm` and `dbtrain` for all others when not given.
        beside: what else the card says.

    Raises:
        UserError: the family has no such format, or `out` is taken or cannot be written.
    """
    target = _located(out)
    there = _is_there(target)
    section = model.config.model
    chosen: Format = format or ("llama" if isinstance(section, CausalLMConfig) else "dbtrain")
    if chosen == "llama" and not isinstance(section, CausalLMConfig):
        raise UserError(
            f"is for causal_lm alone, not for {section.family}", field="--format", value=chosen, mend="use dbtrain"
        )
    config = public(model.config)
    beside = beside or Beside()
    if isinstance(section, CausalLMConfig) and chosen == "llama":
        tensors = clean_weights(model)
        data = safetensors.torch.save(tensors, metadata={"format": "pt"})
        tokenizer = tokenizer_files(model, section)
        card = llama_card(model, config, beside, about_llama(model, bool(tokenizer)))
        described = describe(section, tied=HEAD not in tensors)
    else:
        tensors = _own_weights(model)
        data = safetensors.torch.save(tensors)
        tokenizer = {} if model.tokenizer is None else {TOKENIZER: model.tokenizer}
        card = dbtrain_card(model, config, beside)
        described = describe_model(config, model.plan, model.weights, model.steps, hashlib.sha256(data).hexdigest())
    files = {"README.md": card.encode(), **tokenizer, "model.safetensors": data, "config.json": json_file(described)}
    _write(files, target, there)
    return Exported(
        path=str(target),
        format=chosen,
        weights=model.weights,
        clean_path=chosen == "llama" and not model.end_to_end,
        parameters=sum(tensor.numel() for name, tensor in tensors.items() if name != "codebook"),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        tokenizer=bool(tokenizer),
    )


def public(config: RunConfig) -> RunConfig:
    """The configuration without what it tells of machine and user: where data and a checkpoint lay, who was told."""
    data = config.data.model_copy(update={"path": None, "cache": None})
    model, pretrained = config.model, getattr(config.model, "pretrained", None)
    if pretrained is not None:
        model = model.model_copy(update={"pretrained": Path(pretrained).name})
    return config.model_copy(update={"data": data, "model": model, "monitoring": MonitoringConfig()})


def _own_weights(model: AssembledModel) -> dict[str, Tensor]:
    """All tensors by the names that `assemble` gave them."""
    tensors = {} if model.codebook is None else {"codebook": model.codebook}
    for block, module in zip(model.plan.blocks, model.modules, strict=True):
        tensors |= {f"blocks.{block.index}.{name}": value for name, value in module.named_parameters()}
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _located(out: str | Path) -> Path:
    """The folder's absolute path."""
    if "://" in str(out):
        mend = "export to a folder of this machine, which the library can read, and copy it from there"
        raise UserError("is an address", field="--out", value=str(out), mend=mend)
    try:
        return Path(out).expanduser().absolute()
    except RuntimeError:
        raise UserError("names a home that cannot be found", field="--out", value=str(out), mend=_MEND) from None


def _is_there(target: Path) -> bool:
    """Whether the folder is there, empty.

    Raises:
        UserError: it holds something, or there can be no such folder.
    """
    try:
        names = os.listdir(target)
    except FileNotFoundError:
        return False
    except OSError as error:
        problem = f"cannot be used: {error.strerror}"
        raise UserError(problem, field="--out", value=target, mend=_MEND) from None
    if names:
        raise UserError("is there already", field="--out", value=target, mend=_MEND)
    return True


def _write(files: dict[str, bytes], target: Path, there: bool) -> None:
    """All files or none."""
    storage, folder = LocalStorage(target.parent), target.name if there else temporary_name(target.name)
    try:
        for name, content in files.items():
            storage.write_atomic(f"{folder}/{name}", content)
        if not there:
            storage.commit_folder(folder, target.name)
    except BaseException:
        with contextlib.suppress(UserError):
            for name in [f"{folder}/{name}" for name in files] if there else [folder]:
                storage.remove_tree(name)
        raise
