"""Choosing tokens from a distribution: temperature, nucleus, and one uniform number a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dbtrain.errors import UserError

MOST_STEPS = 100_000
"""Steps of a walk, or iterations, at most."""


def check_seed(seed: int) -> None:
    """Raises UserError: it is not one of those that a run may have."""
    if not 0 <= seed < 2**63:
        raise UserError("has to be from 0 to 2**63 - 1", field="--seed", value=seed)


def check_steps(steps: int) -> None:
    """Raises UserError: no walk has so many."""
    if steps < 1:
        raise UserError("has to be at least 1", field="--steps", value=steps)
    if steps > MOST_STEPS:
        raise UserError(f"has to be at most {MOST_STEPS}", field="--steps", value=steps)


def choose(log_probs_nv: Tensor, uniform_n: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """One token a row, by inverting the distribution function of the rows' tokens at `uniform_n`.

    Args:
        log_probs_nv: log-probabilities (N, V).
        uniform_n: numbers in [0, 1), (N,); they alone decide.
        temperature: above 0; divides the log-probabilities.
        top_p: in (0, 1]; tokens outside the smallest set that has this probability are left out (Holtzman et al. 2020).

    Returns:
        Token ids, int64 (N,).
    """
    # In float64: with float32 sums a likely last token would swallow the rounding error of a large vocabulary.
    below_nv = log_probs_nv.double() - log_probs_nv.max(dim=-1, keepdim=True).values  # finite at any temperature
    probs_nv, ids_nv = (below_nv / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before_nv = probs_nv.cumsum(dim=-1) - probs_nv
    kept_nv = probs_nv * (before_nv < top_p)
    reached_nv = kept_nv.cumsum(dim=-1)
    target_n1 = (uniform_n.to(reached_nv)[:, None] * reached_nv[:, -1:]).contiguous()
    place_n1 = torch.searchsorted(reached_nv, target_n1, right=True)
    last_n1 = (kept_nv > 0).sum(dim=-1, keepdim=True) - 1
    return ids_nv.gather(1, torch.minimum(place_n1, last_n1))[:, 0]


@dataclass(frozen=True)
class Decoding:
    """How a token is taken from a distribution over the vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    """Always the likeliest token."""

    def __post_init__(self) -> None:
        """Raises UserError: a number is out of its range, or goes with nothing."""
        if not 0.0 < self.temperature < float("inf"):
            mend = "use --greedy for the likeliest token"
            raise UserError("has to be above 0", field="--temperature", value=self.temperature, mend=mend)
        if not 0.0 < self.top_p <= 1.0:
            raise UserError("has to be above 0 and at most 1", field="--top-p", value=self.top_p)
        for field, value in (("--temperature", self.temperature), ("--top-p", self.top_p)):
            if self.greedy and value != 1.0:
                raise UserError("has no meaning with --greedy", field=field, value=value, mend="leave one of them out")

    def __call__(self, probabilities_nv: Tensor, uniform_n: Tensor) -> Tensor:
        """One token a row, int64 (N,)."""
        if self.greedy:
            return probabilities_nv.argmax(dim=-1)
        log_probs = probabilities_nv.double().log()
        return choose(log_probs, uniform_n, temperature=self.temperature, top_p=self.top_p)
