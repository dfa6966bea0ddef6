"""An assembled causal language model as a folder that Hugging Face's Llama loads.

What is written is an ordinary transformer: one embedding, all layers in a row, one norm, one head. An end-to-end
network is just that, and is exported exactly. Denoising blocks are not. Of them goes out the stitched *clean path*: the
embedding of the first block, the layers of all blocks, final norm and head of the last one. What turns a block into a
denoiser (code stem, noise embedding, modulations, codebook, the other blocks' embeddings and heads) has no place there,
and the chain with it.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.data.text.tokenizer import load_tokenizer
from dbtrain.errors import UserError
from dbtrain.model_config import CausalLMConfig
from dbtrain.models.pretrained import EMBEDDING, HEAD, checkpoint_name
from dbtrain.run_directory import TOKENIZER
from dbtrain.storage import LocalStorage, temporary_name

_MEND = "choose a new or empty folder"


@dataclass(frozen=True)
class Exported:
    """What `export` made."""

    path: str
    clean_path: bool
    """Whether it is the clean path of denoising blocks; otherwise it is the end-to-end network itself."""
    parameters: int
    bytes: int
    """Of model.safetensors."""
    tokenizer: bool
    """Whether the folder has a tokenizer that the library reads; tokens that are bytes have none."""


def export(model: AssembledModel, out: str | Path) -> Exported:
    """Write an assembled model into the folder `out` of this machine.

    A text goes into the exported model as it goes into ours: first the document separator (bos_token_id in
    config.json), which the exported tokenizer puts there, then the tokens.

    A new folder appears under its name complete. One that is there is filled in place, since it may be a mount point or
    the working directory; config.json comes last, and without it nobody takes the rest for a model.

    Raises:
        UserError: the model is of another family, or `out` is taken or cannot be written.
    """
    target = _located(out)
    there = _is_there(target)
    section = model.config.model
    if section.family != "causal_lm":
        raise UserError("cannot be exported, only causal_lm can", field="model.family", value=section.family)
    assert isinstance(section, CausalLMConfig)
    tensors = clean_weights(model)
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    tokenizer = _tokenizer_files(model, section)
    files = {
        "README.md": _card(model, bool(tokenizer)).encode(),
        **tokenizer,
        "model.safetensors": data,
        "config.json": _text(_describe(section, tied=HEAD not in tensors)),
    }
    _write(files, target, there)
    return Exported(
        path=str(target),
        clean_path=not model.end_to_end,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=len(data),
        tokenizer=bool(tokenizer),
    )


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


def clean_weights(model: AssembledModel) -> dict[str, Tensor]:
    """The weights of the plain forward pass through all layers, by their names in a Hugging Face checkpoint.

    A head that is tied to the embedding inside each block goes out as a matrix of its own where blocks are several:
    the last block's embedding is not the first's.
    """
    first, last = model.modules[0], model.modules[-1]
    tensors: dict[str, Tensor] = {}
    for block, module in zip(model.plan.blocks, model.modules, strict=True):
        for name, value in module.named_parameters():
            stored = checkpoint_name(name, block.layers[0])
            giver = first if stored == EMBEDDING else module if name.startswith("layers.") else last
            if stored is not None and module is giver:
                tensors[stored] = value
    if HEAD not in tensors and last is not first:
        tensors[HEAD] = last.get_parameter("embed_tokens.weight")
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _describe(model: CausalLMConfig, tied: bool) -> dict[str, Any]:
    """config.json. The base of RoPE stands in it twice, as versions 4 and 5 of the library look for it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.width // model.heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": model.length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": tied,
        "bos_token_id": model.begin,
        "eos_token_id": model.begin,
        "torch_dtype": "float32",
    }


def _tokenizer_files(model: AssembledModel, section: CausalLMConfig) -> dict[str, bytes]:
    """The tokenizer and what the library wants to know of it; none where tokens are bytes.

    Whatever the tokenizer used to put around a text, the separator before it is what the network was trained with.
    """
    if model.tokenizer is None or load_tokenizer(model.tokenizer).kind == "byte":
        return {}
    raw = json.loads(model.tokenizer)
    separator = {token["id"]: token["content"] for token in raw["added_tokens"]}[section.begin]
    begin = {"SpecialToken": {"id": separator, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {separator: {"id": separator, "ids": [section.begin], "tokens": [separator]}},
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "model_max_length": section.length,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER: json.dumps(raw, ensure_ascii=False).encode(), "tokenizer_config.json": _text(about)}


def _card(model: AssembledModel, has_tokenizer: bool) -> str:
    config, section = model.config, model.config.model
    assert isinstance(section, CausalLMConfig)
    if model.end_to_end:
        what = "The network, trained end to end by dbtrain; nothing was changed."
    else:
        what = (
            f"The clean path through {len(model.modules)} blocks that dbtrain trained independently: embedding of the"
            " first block, all layers, final norm and head of the last. This is an ordinary forward pass and not the"
            " denoising chain, which the run's own model folder has; how well it predicts is for you to measure."
        )
    if has_tokenizer:
        ids = f"Its tokenizer is here, and puts the token {section.begin}, which ends documents, before every text."
    else:
        ids = (
            f"Token ids 0 to 255 are the bytes of UTF-8 text. Every text begins with the token {section.begin}, which"
            " also ends documents."
        )
    return (
        f"# {config.name}\n\n{what}\n\n{ids} A text has at most {section.length} tokens, that one included.\n\n"
        f"- SHA-256 of the model.safetensors it was made from: `{model.sha256}`\n"
    )


def _text(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
