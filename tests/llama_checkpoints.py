"""Tiny checkpoints as Hugging Face's library writes them, and the `model` section that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

LENGTH, VOCAB = 32, 257
SECTION: dict[str, Any] = {
    "family": "causal_lm",
    "depth": 4,
    "width": 16,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 24,
    "length": LENGTH,
    "vocab_size": VOCAB,
    "rope_theta": 5000.0,
    "norm_eps": 1e-4,
}
"""What the checkpoints fit; they have grouped queries, and nothing in them has its usual value."""
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-4,
}


def make_llama(*, tied: bool = False, mistral: bool = False) -> Any:
    """A random network whose norms, too, are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if mistral:
            network: Any = MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=None))
        else:
            network = LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=tied, initializer_range=0.2))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
    return network.eval()


def save_llama(folder: Path, network: Any = None, shard: str = "1GB") -> Path:
    """The folder of a checkpoint, in files of at most `shard`."""
    (make_llama() if network is None else network).save_pretrained(folder, max_shard_size=shard)
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a JSON file says."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def shifted(tokens_nl: Tensor, begin: int = VOCAB - 1) -> Tensor:
    """What the library's network has to read, for its answers to be about `tokens_nl`."""
    return torch.cat([torch.full_like(tokens_nl[:, :1], begin), tokens_nl[:, :-1]], dim=1)


def random_rows(n: int = 3) -> Tensor:
    """(n, LENGTH) tokens."""
    return torch.randint(VOCAB, (n, LENGTH), generator=torch.Generator().manual_seed(1))
