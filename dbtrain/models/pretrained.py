"""Checkpoints of Hugging Face's Llama in a local folder: what can be cut into blocks, and reading it tensor by tensor.

A checkpoint is a `config.json` beside `model.safetensors`, or beside `model.safetensors.index.json` and the files it
names. A worker reads the tensors of its own layers, embedding, final norm and head; the others stay on the disk.
Mistral's layers are Llama's where its sliding window is no shorter than the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dbtrain.diffusion.codebook import stretch_rows
from dbtrain.errors import CorruptData, UserError
from dbtrain.model_config import CausalLMConfig

FIELD = "model.pretrained"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER_PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The weights of a Llama layer; a conditioned layer of ours has a modulation besides."""

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_OUTER = {"embed_tokens.weight": EMBEDDING, "norm.weight": "model.norm.weight", "lm_head.weight": HEAD}
_LAYER = re.compile(rf"layers\.(\d+)\.((?:{'|'.join(map(re.escape, LAYER_PARTS))})\.weight)")
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_FLOATS = ("F32", "F16", "BF16")
# What the library takes where config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
}
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}


def checkpoint_name(parameter: str, first_layer: int = 0) -> str | None:
    """What a checkpoint calls a parameter of a module whose layers start with `first_layer`; None if it has none."""
    layer = _LAYER.fullmatch(parameter)
    if layer is not None:
        return f"model.layers.{first_layer + int(layer[1])}.{layer[2]}"
    return _OUTER.get(parameter)


class Checkpoint:
    """The checkpoint of a `model` section: known to be of our form and of the section's sizes."""

    def __init__(self, model: CausalLMConfig):
        """Read the configuration and the index; no tensor is looked at.

        Raises:
            UserError: there is no checkpoint, it cannot be cut into blocks, or its sizes are not the section's.
            CorruptData: its configuration or its index is damaged.
        """
        assert model.pretrained is not None
        self.folder = Path(model.pretrained).expanduser()
        if not self.folder.is_dir():
            raise self._missing("there is no such folder")
        self._model = model
        self._about = _with_defaults(self._read_json(_CONFIG))
        self._check_form()
        self._check_sizes()
        self._tied = bool(self._about["tie_word_embeddings"])
        self._index: Mapping[str, str] | None = self._read_index()
        self._open: dict[str, Any] = {}

    def verify(self) -> None:
        """Whether every tensor is there, of the right shape; reads the heads of the files alone.

        Raises:
            UserError: a file or tensor is missing, or of a type that is no float.
            CorruptData: a file is torn, or a tensor of another shape than config.json says.
        """
        for name, shape in self._shapes().items():
            self._check_tensor(name, shape)

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the checkpoint, as it is stored; a tied head is the embedding.

        Raises:
            UserError, CorruptData: as `verify`; also where a value is not finite.
        """
        if name == HEAD and self._tied:
            name = EMBEDDING
        handle = self._check_tensor(name, self._shapes()[name])
        tensor: Tensor = handle.get_tensor(name)
        if not tensor.isfinite().all():
            raise self._corrupt(f"the tensor {name} holds values that are not finite")
        return tensor

    def _shapes(self) -> dict[str, list[int]]:
        """Of every tensor, from the sizes."""
        model, kv_heads = self._model, self._model.kv_heads or self._model.heads
        width, key_width = model.width, kv_heads * (model.width // model.heads)
        shapes = {EMBEDDING: [model.vocab_size, width], "model.norm.weight": [width]}
        if not self._tied:
            shapes[HEAD] = [model.vocab_size, width]
        parts = {
            "self_attn.k_proj": [key_width, width],
            "self_attn.v_proj": [key_width, width],
            "self_attn.q_proj": [width, width],
            "self_attn.o_proj": [width, width],
            "mlp.gate_proj": [model.mlp_width, width],
            "mlp.up_proj": [model.mlp_width, width],
            "mlp.down_proj": [width, model.mlp_width],
        }
        for layer in range(model.depth):
            shapes |= {f"model.layers.{layer}.{part}.weight": parts.get(part, [width]) for part in LAYER_PARTS}
        return shapes

    def _check_tensor(self, name: str, shape: list[int]) -> Any:
        """The open file that holds the tensor."""
        if self._index is not None and name not in self._index:
            raise self._missing(f"the checkpoint has no tensor {name}")
        handle = self._file(_SINGLE if self._index is None else self._index[name])
        if name not in handle.keys():  # noqa: SIM118 - the handle is no mapping
            raise self._missing(f"the checkpoint has no tensor {name}")
        view = handle.get_slice(name)
        if view.get_dtype() not in _FLOATS:
            raise self._uncut(f"the tensor {name} is stored as {view.get_dtype()}")
        if view.get_shape() != shape:
            raise self._corrupt(f"the tensor {name} has the shape {view.get_shape()}, and config.json says {shape}")
        return handle

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            if not path.is_file():
                raise self._missing(f"the checkpoint has no file {name}")
            try:
                self._open[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise self._corrupt(f"{name} is torn: {' '.join(str(error).split())}") from None
            except OSError as error:
                raise self._missing(f"{name} cannot be read: {error.strerror or error}") from None
        return self._open[name]

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise self._missing(f"the folder has no {name}") from None
        except OSError as error:
            raise self._missing(f"{name} cannot be read: {error.strerror}") from None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._corrupt(f"{name} is not that of a checkpoint")
        return found

    def _read_index(self) -> Mapping[str, str] | None:
        """File of each tensor; None where one file has them all."""
        if (self.folder / _SINGLE).exists():
            return None
        if not (self.folder / _INDEX).exists():
            raise self._missing(f"the folder has neither {_SINGLE} nor {_INDEX}")
        files = self._read_json(_INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in files.values()
        ):
            raise self._corrupt(f"{_INDEX} does not name a file for each tensor")
        return files

    def _check_form(self) -> None:
        about = self._about
        names = about.get("architectures")
        if str(about["model_type"]) not in _DEFAULTS:
            raise self._uncut(f"its layers are not Llama's: model_type is {about['model_type']!r}")
        if names and not (isinstance(names, list) and set(map(str, names)) <= set(_ARCHITECTURES)):
            raise self._uncut(f"it is not a language model with a head for tokens: architectures is {names}")
        if about.get("quantization_config"):
            raise self._uncut("its weights are quantised (quantization_config)")
        if about.get("attention_bias"):
            raise self._uncut("its attention has biases (attention_bias)")
        if about.get("mlp_bias"):
            raise self._uncut("its MLP has biases (mlp_bias)")
        if about["hidden_act"] != "silu":
            raise self._uncut(f"its MLP is no SwiGLU: hidden_act is {about['hidden_act']!r}")
        if about["rope_type"] != "default":
            raise self._uncut(f"its rotary positions are rescaled: rope_type is {about['rope_type']!r} (rope_scaling)")
        if about["partial_rotary_factor"] != 1:
            raise self._uncut("it turns a part of each head only (partial_rotary_factor)")
        width, heads, head_width = (self._size(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
        if head_width * heads != width:
            raise self._uncut(f"its heads are {head_width} wide and not {width} / {heads} (head_dim)")
        if about["model_type"] == "mistral" and about["sliding_window"] is not None:
            window = self._size("sliding_window")
            if window < self._model.length:
                raise self._uncut(
                    f"its attention has a window of {window} tokens, shorter than the text (sliding_window)"
                )

    def _check_sizes(self) -> None:
        for field, name in _SIZES.items():
            have, need = getattr(self._model, field), self._size(name)
            if field == "kv_heads" and have is None:
                have = self._model.heads
            if have != need:
                mend = f"set model.{field}={need}"
                if field == "vocab_size":
                    mend += (
                        ", and prepare the text with the checkpoint's tokenizer; if that knows fewer tokens, fit the"
                        " checkpoint to it with resize_token_embeddings of transformers"
                    )
                raise UserError(
                    f"the checkpoint in {self.folder} has {name} {need}", field=f"model.{field}", value=have, mend=mend
                )
        longest = self._size("max_position_embeddings")
        if self._model.length > longest:
            raise UserError(
                f"the checkpoint in {self.folder} knows texts of up to {longest} tokens",
                field="model.length",
                value=self._model.length,
                mend=f"set model.length={longest} or less, and prepare the text with it",
            )
        if self._model.tie_head and not self._about["tie_word_embeddings"]:
            raise UserError(
                f"the checkpoint in {self.folder} has a head of its own",
                field="model.tie_head",
                value=True,
                mend="set model.tie_head=false",
            )

    def _size(self, name: str) -> Any:
        value = self._about.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._corrupt(f"{_CONFIG} has {name} {value!r}, which is no size")
        return value

    def _missing(self, problem: str) -> UserError:
        mend = f"give the folder of a Hugging Face checkpoint: {_CONFIG} and {_SINGLE}, or {_INDEX} and its files"
        return UserError(problem, field=FIELD, value=str(self.folder), mend=mend)

    def _corrupt(self, problem: str) -> CorruptData:
        return CorruptData(problem, field=FIELD, value=str(self.folder), mend="fetch the checkpoint again")

    def _uncut(self, part: str) -> UserError:
        return UserError(
            f"the checkpoint cannot be cut into blocks: {part}",
            field=FIELD,
            value=str(self.folder),
            mend="give one of Llama's form: rotary positions, RMSNorm and SwiGLU, no biases",
        )


def start_from_checkpoint(model: CausalLMConfig, layers: tuple[int, int], module: nn.Module) -> None:
    """Overwrite what a fresh module shares with the checkpoint; what makes it a denoising block stays as it is.

    Raises:
        UserError, CorruptData: as `Checkpoint` and its `read`.
    """
    checkpoint = Checkpoint(model)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            stored = checkpoint_name(name, layers[0])
            if stored is not None:
                parameter.copy_(checkpoint.read(stored))


def codebook_of_checkpoint(model: CausalLMConfig, scale: float) -> Tensor:
    """The rows of the checkpoint's embedding, each stretched to the Euclidean norm `scale`: (vocabulary, width).

    Raises:
        UserError, CorruptData: as `Checkpoint` and its `read`.
    """
    return stretch_rows(Checkpoint(model).read(EMBEDDING), scale)


def _with_defaults(about: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, with the library's values where it has none, and its two spellings of RoPE in one."""
    known = {
        "model_type": None,
        "hidden_act": "silu",
        "num_key_value_heads": about.get("num_attention_heads"),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 1.0,
        **_DEFAULTS.get(str(about.get("model_type")), {}),
        **{name: value for name, value in about.items() if value is not None or name == "sliding_window"},
    }
    # Up to version 4 of the library rope_theta stands beside rope_scaling, since then both in rope_parameters.
    rope = {**_mapping(about.get("rope_scaling")), **_mapping(about.get("rope_parameters"))}
    known["rope_theta"] = rope.get("rope_theta", known["rope_theta"])
    known["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    known["partial_rotary_factor"] = rope.get("partial_rotary_factor", known["partial_rotary_factor"])
    if "head_dim" not in known:
        width, heads = known.get("hidden_size"), known.get("num_attention_heads")
        if isinstance(width, int) and isinstance(heads, int) and heads > 0:
            known["head_dim"] = width // heads
    return known


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
