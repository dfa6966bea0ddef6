"""Cross-entropy of many tokens over a large vocabulary, without all logits in memory at once.

PyTorch's own `linear_cross_entropy` is newer than the oldest PyTorch that has to do, and its chunked path neither
compiles nor gives a loss a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dbtrain.models.layers import kept

WHOLE = 2**26
"""So many logits may be in memory at once: 268 MB in float32, three times that on the way back."""
CHUNK = 2**24
"""Where there are more, so many at a time: matrix products that keep a GPU busy."""


def needs_chunks(targets: Tensor, vocab_size: int) -> bool:
    """Whether the logits of all these tokens are too many to be computed at once."""
    return targets.numel() * vocab_size > WHOLE


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor], x_ntd: Tensor, targets_nt: Tensor, vocab_size: int
) -> Tensor:
    """Nats (N, T) of each token, by a head that makes logits (tokens, vocabulary) of what enters it.

    A chunk's logits are computed again on the way back (Chen et al. 2016): one more product with the head's matrix.
    """
    size = max(1, CHUNK // vocab_size)
    chunks = zip(torch.split(kept(x_ntd.flatten(0, 1)), size), torch.split(targets_nt.flatten(), size), strict=True)
    nats = [
        checkpoint(_cross_entropy, head, x_td, targets_t, use_reentrant=False, preserve_rng_state=False)
        for x_td, targets_t in chunks
    ]
    return torch.cat(nats).view(targets_nt.shape)


def _cross_entropy(head: Callable[[Tensor], Tensor], x_td: Tensor, targets_t: Tensor) -> Tensor:
    return F.cross_entropy(head(x_td).float(), targets_t, reduction="none")
