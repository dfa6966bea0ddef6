"""Expected calibration error: how far the probability of the answer is from how often the answer is right.

Source: Guo et al. 2017, equation 3, with the 15 bins of equal width that they use.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


class Calibration:
    """Running sums over a split; the error is that of all rows at once, not a mean over batches."""

    def __init__(self) -> None:
        self._gaps = torch.zeros(BINS, dtype=torch.float64)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Take in a batch of answers (N, classes) and the true labels (N,)."""
        top, answers = (value.cpu() for value in probabilities.max(dim=-1))
        gaps = (answers == labels.cpu()).double() - top.double()
        # Bins are open below and closed above, as in the paper: 1.0 belongs to the last.
        bins = (top.double() * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
        self._gaps += torch.bincount(bins, weights=gaps, minlength=BINS)

    def error(self, rows: int) -> float:
        """Mean over all rows of |accuracy - mean top probability| of the row's bin: a fraction."""
        return float(self._gaps.abs().sum()) / rows
