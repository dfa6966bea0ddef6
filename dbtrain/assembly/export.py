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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel, load_model
from dbtrain.data.text.tokenizer import load_tokenizer
from dbtrain.errors import UserError
from dbtrain.model_config import CausalLMConfig
from dbtrain.models.pretrained import EMBEDDING, HEAD, checkpoint_name
from dbtrain.run_directory import TOKENIZER
from dbtrain.storage import Storage, temporary_name


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


def export(run: str, out: str | Path) -> Exported:
    """Write the assembled model in `run`, a run directory or model folder, into the new folder `out`.

    A text goes into the exported model as it goes into ours: first the document separator (bos_token_id in
    config.json), then the tokens.

    Raises:
        UserError: there is no assembled model, or one of another family, or `out` is taken or cannot be written.
        CorruptData: the model's files are damaged.
    """
    target = Path(out).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("is there already", field="--out", value=target, mend="choose a new or empty folder")
    model = load_model(run)
    section = model.config.model
    if section.family != "causal_lm":
        raise UserError(f"holds a {section.family}, and only causal_lm can be exported", field="RUN", value=run)
    assert isinstance(section, CausalLMConfig)
    tensors = clean_weights(model)
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    tokenizer = _tokenizer_files(model, section)
    files = {
        "config.json": _text(_describe(section, tied=HEAD not in tensors)),
        "README.md": _card(model, bool(tokenizer)).encode(),
        **tokenizer,
        "model.safetensors": data,
    }
    storage, folder = Storage.open(target.parent), temporary_name(target.name)
    try:
        for name, content in files.items():
            storage.write_atomic(f"{folder}/{name}", content)
        storage.commit_folder(folder, target.name)
    except BaseException:
        with contextlib.suppress(UserError):
            storage.remove_tree(folder)
        raise
    return Exported(
        path=str(target),
        clean_path=not model.end_to_end,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=len(data),
        tokenizer=bool(tokenizer),
    )


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
    """The tokenizer and what the library wants to know of it; none where tokens are bytes."""
    if model.tokenizer is None or load_tokenizer(model.tokenizer).kind == "byte":
        return {}
    added = {token["id"]: token["content"] for token in json.loads(model.tokenizer)["added_tokens"]}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": added[section.begin],
        "eos_token": added[section.begin],
        "model_max_length": section.length,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER: model.tokenizer, "tokenizer_config.json": _text(about)}


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
    ids = "Its tokenizer is here." if has_tokenizer else "Token ids 0 to 255 are the bytes of UTF-8 text."
    return (
        f"# {config.name}\n\n{what}\n\n"
        f"{ids} Every text begins with the token {section.begin}, which also ends documents.\n\n"
        f"- SHA-256 of the model.safetensors it was made from: `{model.sha256}`\n"
    )


def _text(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
