"""An assembled causal language model in the form of Hugging Face's Llama.

What is written is an ordinary transformer: one embedding, all layers in a row, one norm, one head. An end-to-end
network is just that, and is exported exactly. Denoising blocks are not. Of them goes out the stitched *clean path*: the
embedding of the first block, the layers of all blocks, final norm and head of the last one. What turns a block into a
denoiser (code stem, noise embedding, modulations, codebook, the other blocks' embeddings and heads) has no place there,
and the chain with it.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.data.text.tokenizer import load_tokenizer
from dbtrain.model_config import CausalLMConfig
from dbtrain.models.pretrained import EMBEDDING, HEAD, checkpoint_name
from dbtrain.run_directory import TOKENIZER


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


def describe(model: CausalLMConfig, tied: bool) -> dict[str, Any]:
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


def tokenizer_files(model: AssembledModel, section: CausalLMConfig) -> dict[str, bytes]:
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
    return {TOKENIZER: json.dumps(raw, ensure_ascii=False).encode(), "tokenizer_config.json": json_file(about)}


def about_llama(model: AssembledModel, has_tokenizer: bool) -> str:
    """What the model card says of the network."""
    section = model.config.model
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
    return f"{what}\n\n{ids} A text has at most {section.length} tokens, that one included."


def json_file(values: dict[str, Any]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(values, indent=2) + "\n").encode()
