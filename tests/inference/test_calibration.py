from __future__ import annotations

import pytest
import torch

from dbtrain.inference.calibration import Calibration


def test_by_hand() -> None:
    """Four rows in three bins: (0.79, right) and (0.75, wrong) share (11/15, 12/15]; 1.0 and 0.5 are alone."""
    calibration = Calibration()
    calibration.add(torch.tensor([[0.79, 0.21], [0.25, 0.75]]), torch.tensor([0, 0]))
    calibration.add(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1]))
    assert calibration.error(4) == pytest.approx((abs(1 - 0.79 - 0.75) + 0.0 + 0.5) / 4, abs=1e-6)


@pytest.mark.parametrize("parts", [1, 7, 500])
def test_it_is_that_of_the_split_not_a_mean_of_batches(parts: int) -> None:
    """Confidence is right within each bin, so the error is small however small the batches are."""
    top = torch.linspace(0.51, 1.0, 4000, dtype=torch.float64)
    place = torch.arange(4000) * 0.6180339887 % 1.0
    labels = (place > top).long()
    calibration = Calibration()
    for some, true in zip(torch.stack([top, 1 - top], dim=-1).chunk(parts), labels.chunk(parts), strict=True):
        calibration.add(some, true)
    assert calibration.error(4000) < 0.01
