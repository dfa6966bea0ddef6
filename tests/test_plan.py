from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dbtrain.plan import BlockPlan, Bytes, DatasetFacts, NoiseRange, Plan, split_layers


def block(index: int, layers: tuple[int, int], noise: NoiseRange | None) -> BlockPlan:
    cost = Bytes(parameters=400, buffers=40, gradients=400, optimiser=800, ema=0, activations=1234)
    return BlockPlan(
        index=index,
        layers=layers,
        noise=noise,
        trained=noise,
        parameters=100,
        bytes=cost,
        evaluations=layers[1] - layers[0],
        flops_per_sample=10**12,
    )


def plan(*blocks: BlockPlan) -> Plan:
    facts = DatasetFacts(
        sha256="ab",
        kind="image",
        shape=(1, 8, 8),
        train_rows=7,
        test_rows=3,
        class_names=("cat", "Katze, große"),
        mean=(0.1,),
        std=(1 / 3,),
        vocab_size=None,
        separator=None,
        tokenizer_sha256=None,
    )
    return Plan(
        kind="blocks",
        name="run",
        config_sha256="cd",
        codebook_sha256=None,
        seed=2**63 - 1,
        steps=10,
        batch_size=32,
        threads=1,
        data=facts,
        blocks=blocks,
    )


@settings(deadline=None, derandomize=True, max_examples=150)
@given(count=st.integers(1, 40), spare=st.integers(0, 200))
def test_every_layer_is_owned_once_and_remainders_go_to_the_first_blocks(count: int, spare: int) -> None:
    depth = count + spare
    pieces = split_layers(depth, count)
    assert len(pieces) == count
    assert (pieces[0][0], pieces[-1][1]) == (0, depth)
    assert all(before[1] == after[0] for before, after in pairwise(pieces))
    sizes = [end - first for first, end in pieces]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_twelve_and_fourteen_layers_in_three_blocks() -> None:
    assert split_layers(12, 3) == [(0, 4), (4, 8), (8, 12)]
    assert split_layers(14, 3) == [(0, 5), (5, 10), (10, 14)]


def test_explicit_split() -> None:
    assert split_layers(12, 3, [2, 4, 6]) == [(0, 2), (2, 6), (6, 12)]


@pytest.mark.parametrize(
    ("depth", "count", "split"),
    [
        (2, 3, None),
        (3, 0, None),
        (12, 3, [4, 4]),
        (12, 3, [4, 4, 5]),
        (12, 3, [12, 0, 0]),
        (12, 3, [8, 8, -4]),
    ],
)
def test_impossible_splits_are_refused(depth: int, count: int, split: list[int] | None) -> None:
    with pytest.raises(ValueError, match="layers"):
        split_layers(depth, count, split)


def test_a_plan_survives_json_bit_for_bit() -> None:
    original = plan(
        block(0, (0, 2), NoiseRange(low=0.505041464031, high=80.0)),
        block(1, (2, 3), NoiseRange(low=0.1 + 0.2, high=0.505041464031)),
    )
    assert Plan.model_validate_json(original.model_dump_json()) == original


def test_layer_evaluations_of_blocks_and_of_one_network_agree() -> None:
    whole = plan(block(0, (0, 6), None))
    cut = plan(*(block(index, layers, None) for index, layers in enumerate(split_layers(6, 4))))
    assert cut.layer_evaluations == whole.layer_evaluations == 10 * 32 * 6


def test_bytes_add_up() -> None:
    assert block(0, (0, 1), None).bytes.total == 400 + 40 + 400 + 800 + 1234


def test_a_plan_has_blocks_and_only_known_fields() -> None:
    with pytest.raises(ValidationError):
        plan()
    with pytest.raises(ValidationError):
        Plan.model_validate({**plan(block(0, (0, 1), None)).model_dump(), "extra": 1})


def test_records_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        plan(block(0, (0, 1), None)).steps = 3  # type: ignore[misc]
