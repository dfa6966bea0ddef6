"""Small text models without any data, trained a little on random tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.models import TrainableModule, family_of
from dbtrain.models.causal_lm import CausalLM, CausalLMBlock
from dbtrain.plan import NoiseRange

LENGTH, VOCAB = 12, 11
RANGE = NoiseRange(low=0.2, high=5.0)


def text_config(family: str = "causal_lm", **sections: object) -> RunConfig:
    """A run of a small text family; keyword arguments replace fields of a section."""
    raw: dict[str, object] = {
        "name": "small",
        "seed": 7,
        "model": {
            "family": family,
            "depth": 4,
            "width": 16,
            "heads": 4,
            "mlp_width": 24,
            "length": LENGTH,
            "vocab_size": VOCAB,
        },
        "data": {"source": "topics"},
        "blocks": {"count": 2},
        "training": {"steps": 60, "batch_size": 8},
    }
    for name, value in sections.items():
        old = raw.get(name)
        raw[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return parse_config(raw)


def random_tokens(n: int = 8, seed: int = 1) -> Tensor:
    """(n, LENGTH)."""
    return torch.randint(VOCAB, (n, LENGTH), generator=torch.Generator().manual_seed(seed))


def train_a_little(module: TrainableModule, steps: int = 5) -> None:
    """Away from the start, where projections are zero and much would hold by accident."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    source = torch.Generator().manual_seed(2)
    for step in range(steps):
        optimizer.zero_grad()
        tokens = random_tokens(seed=step)
        module.training_loss({"tokens": tokens}, module.draw(len(tokens), source)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def causal_block(config: RunConfig, steps: int = 5) -> CausalLMBlock:
    """A block of two layers, trained for a few steps."""
    torch.manual_seed(0)
    family = family_of(config)
    block = family.build_block(config, (0, 2), RANGE, family.codebook(config))
    assert isinstance(block, CausalLMBlock)
    train_a_little(block, steps)
    return block.eval()


def causal_lm(config: RunConfig, steps: int = 5) -> CausalLM:
    """The end-to-end network, trained for a few steps."""
    torch.manual_seed(0)
    whole = CausalLM(config)
    train_a_little(whole, steps)
    return whole.eval()


def noisy_codes(block: CausalLMBlock, n: int = 8) -> tuple[Tensor, Tensor]:
    """Codes and noise levels for `random_tokens(n)`."""
    draw = block.draw(n, torch.Generator().manual_seed(3))
    return block.codebook[random_tokens(n)] + draw["sigma"][..., None] * draw["eps"], draw["sigma"]
