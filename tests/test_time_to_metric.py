"""Seconds to a metric: what is trained, and which of it counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from time_to_metric import RECIPE, lengths, reached

from dbtrain.errors import UserError

ROWS = [
    {"side": "blocks", "steps": 100, "value": 0.2, "seconds": 1.0},
    {"side": "blocks", "steps": 200, "value": 0.6, "seconds": 3.0},
    {"side": "blocks", "steps": 300, "value": 0.7, "seconds": 2.0},
    {"side": "end to end", "steps": 100, "value": 0.4, "seconds": 5.0},
]


def test_the_fastest_length_that_is_good_enough() -> None:
    blocks, whole = reached(ROWS, 0.5, "higher")
    assert blocks == {"side": "blocks", "steps": 300, "seconds": 2.0}
    assert whole == {"side": "end to end", "steps": "", "seconds": ""}
    blocks, whole = reached(ROWS, 0.6, "lower")
    assert (blocks["steps"], whole["steps"]) == (100, 100)


def test_each_side_has_every_length_and_seed() -> None:
    found = lengths(RECIPE, [], [300, 600], [0, 1, 2], workers=2)
    assert [(one.kind, one.steps) for one in found] == [
        *(("blocks", 300), ("end_to_end", 300), ("end_to_end", 300)),
        *(("blocks", 600), ("end_to_end", 600), ("end_to_end", 600)),
    ]
    assert [config.seed for config in found[0].configs] == [0, 1, 2]
    assert {config.blocks.count for one in found for config in one.configs} == {2}
    assert [one.configs[0].resources.replicas for one in found[:3]] == [1, 1, 2]
    assert len(lengths(RECIPE, [], [300], [0], workers=1)) == 2


@pytest.mark.parametrize(("workers", "field"), [(8, "blocks.count"), (3, "resources.replicas")])
def test_nothing_is_trained_where_the_recipe_cannot_be_cut_so(workers: int, field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=field):
        lengths(RECIPE, [], [300], [0], workers)
