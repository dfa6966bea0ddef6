"""`blocks.partition.kind: equal_information`, which needs the family's codebook."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dbtrain.config import RunConfig
from dbtrain.diffusion.information import equal_information_edges
from dbtrain.errors import UserError
from dbtrain.models import family_of

KIND = {"partition": {"kind": "equal_information"}}


@pytest.mark.parametrize("family", ["vit", "causal_lm", "recurrent_lm"])
def test_ranges_follow_from_the_codebook(family_config: Callable[..., RunConfig], family: str) -> None:
    config = family_config(family, blocks=KIND)
    codebook = family_of(config).codebook(config)
    assert codebook is not None
    found = [piece.noise.low for piece in family_of(config).cut(config) if piece.noise is not None]
    assert found == [*equal_information_edges(codebook, 3, 0.002, 80.0), 0.002]


@pytest.mark.parametrize(
    ("family", "why"), [("dit", "codes of labels or tokens"), ("masked_lm", "is for Gaussian noise")]
)
def test_families_without_codes_refuse_it(family_config: Callable[..., RunConfig], family: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)blocks\.partition\.kind.*equal_information.*{why}"):
        family_config(family, blocks=KIND)
