from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked_lm_runs import LENGTH, SECTIONS, trained_model
from torch import Tensor

from dbtrain.assembly.loading import AssembledModel
from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.inference.front_door import open_model
from dbtrain.inference.unmask import TextUnmasker
from dbtrain.models.masked_lm import MaskedLM


@pytest.fixture(scope="module")
def unmasker(family_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> TextUnmasker:
    config = family_config("masked_lm", **SECTIONS)
    front = open_model(trained_model(config, tmp_path_factory.mktemp("masked") / "run"))
    assert isinstance(front, TextUnmasker)
    return front


class _Calls:
    """Which block was asked at which level, and what it was shown."""

    def __init__(self, unmasker: TextUnmasker, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[int, float, Tensor]] = []
        numbers = {id(module): index for index, module in enumerate(unmasker.model.modules)}
        forward = MaskedLM.forward

        def watched(module: MaskedLM, tokens_nl: Tensor, level_n: Tensor) -> Tensor:
            self.seen.append((numbers[id(module)], float(level_n[0]), tokens_nl.clone()))
            return forward(module, tokens_nl, level_n)

        monkeypatch.setattr(MaskedLM, "forward", watched)

    @property
    def blocks(self) -> list[int]:
        return [block for block, _, _ in self.seen]


def test_each_text_follows_from_its_number_and_the_seed(unmasker: TextUnmasker) -> None:
    three = unmasker.generate(3)
    assert len(set(three)) == 3
    assert all(0 < len(text) <= LENGTH + 8 for text in three)
    torch.manual_seed(1)
    assert unmasker.generate(3) == three
    assert unmasker.generate(5)[:3] == three
    assert unmasker.generate() == three[:1]
    assert set(unmasker.generate(3, seed=1)).isdisjoint(three)
    assert unmasker.generate(3, steps=5) != three
    assert unmasker.generate(3, temperature=0.3) != three
    assert unmasker.generate(3, top_p=0.5) != three


def test_what_was_learned_shows(unmasker: TextUnmasker) -> None:
    text = "".join(unmasker.generate(20, seed=2))
    assert text.count(" ") > 0.08 * len(text)
    assert sum(char.isascii() and (char.isalpha() or char.isspace()) for char in text) > 0.7 * len(text)


def test_blocks_act_where_they_own_the_level(unmasker: TextUnmasker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _Calls(unmasker, monkeypatch)
    unmasker.generate(4, steps=9)
    assert calls.blocks == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    levels = [level for _, level, _ in calls.seen]
    assert levels == pytest.approx([1 - step / 9 for step in range(9)])
    masked = [(tokens == unmasker.mask_id).double().mean().item() for _, _, tokens in calls.seen]
    assert masked == pytest.approx(levels, abs=0.2)
    assert masked == sorted(masked, reverse=True)
    assert masked[0] == 1.0
    for (_, _, before), (_, _, after) in zip(calls.seen, calls.seen[1:], strict=False):
        told = before != unmasker.mask_id
        assert torch.equal(after[told], before[told])  # what is revealed stays


@pytest.mark.parametrize(("steps", "blocks"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])])
def test_fewer_steps_than_blocks(
    unmasker: TextUnmasker, monkeypatch: pytest.MonkeyPatch, steps: int, blocks: list[int]
) -> None:
    calls = _Calls(unmasker, monkeypatch)
    texts = unmasker.generate(2, steps=steps)
    assert calls.blocks == blocks
    assert len(texts) == 2


def test_more_steps_than_tokens_cost_nothing(unmasker: TextUnmasker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _Calls(unmasker, monkeypatch)
    unmasker.generate(1, steps=1000)
    assert len(calls.seen) <= LENGTH
    assert calls.blocks == sorted(calls.blocks)


def test_more_texts_than_fit_at_once(unmasker: TextUnmasker, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = unmasker.generate(5, steps=2)
    monkeypatch.setattr("dbtrain.inference.unmask.GENERATE_BATCH", 2)
    assert unmasker.generate(5, steps=2) == whole


def test_cold_is_the_likeliest_token(unmasker: TextUnmasker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _Calls(unmasker, monkeypatch)
    (text,) = unmasker.generate(1, steps=1, temperature=1e-4)
    monkeypatch.undo()
    _, level, tokens = calls.seen[0]
    best = unmasker.network(0)(tokens, torch.tensor([level]))[0].argmax(dim=-1)
    assert text == unmasker.tokenizer.decode(best.tolist())
    assert unmasker.generate(1, steps=1, top_p=1e-6) == [text]


def test_given_text_is_kept_and_seen(unmasker: TextUnmasker, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _Calls(unmasker, monkeypatch)
    answer = unmasker.infill(["The “", 4, "” is ", 3, "."], steps=6, temperature=0.5)
    pattern = "The “", "” is ", "."
    assert answer.startswith(pattern[0])
    assert answer.endswith(pattern[2])
    assert pattern[1] in answer
    kept = [len(part.encode()) for part in pattern]
    asked = sum(kept) + 7
    first = calls.seen[0][2][0]
    encoded = np.concatenate([unmasker.tokenizer.encode(part) for part in pattern])
    assert first[first != unmasker.mask_id].tolist() == encoded.tolist()
    assert (first[asked:] == unmasker.mask_id).all()
    gaps = list(range(kept[0], kept[0] + 4)) + list(range(asked - kept[2] - 3, asked - kept[2]))
    assert (first[gaps] == unmasker.mask_id).all()
    # It starts where as many tokens are masked as there are to fill in, and only the owners of lower levels act.
    share = (LENGTH - sum(kept)) / LENGTH
    assert all(level <= share + 1e-6 for _, level, _ in calls.seen)
    assert set(calls.blocks) <= {1, 2}
    assert unmasker.infill(["The “", 4, "” is ", 3, "."], steps=6, temperature=0.5) == answer


def test_gaps_alone_and_full_windows(unmasker: TextUnmasker) -> None:
    text = "a" * (LENGTH - 2)
    full = unmasker.infill([text, 2])
    assert full.startswith(text)
    assert unmasker.infill([1, text, 1], seed=3).count("a") >= LENGTH - 2
    assert unmasker.infill([LENGTH], seed=4) == unmasker.generate(1, seed=4)[0]
    assert unmasker.infill(["", 3, "", 2])


def test_documents_are_told_apart(unmasker: TextUnmasker) -> None:
    ids = np.array([97, 98, 256, 99], dtype=np.int64)
    assert unmasker._text(ids) == "ab\n\nc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "--count = 0: has to be at least 1"),
        ({"steps": 0}, "--steps = 0: has to be at least 1"),
        ({"steps": -3}, "--steps = -3"),
        ({"temperature": 0.0}, "--temperature = 0.0: has to be above 0"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p = 0.0"),
        ({"top_p": 1.5}, "--top-p = 1.5"),
    ],
)
def test_bad_options(unmasker: TextUnmasker, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unmasker.generate(**options)
    if "count" not in options:
        with pytest.raises(UserError, match=message):
            unmasker.infill(["a", 3], **options)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no gap to fill in"),
        (["to be"], "no gap to fill in"),
        (["to ", 0, " be"], "--infill = 0: a gap has at least one token"),
        (["to ", -2], "--infill = -2"),
        ([LENGTH + 1], f"a window of the model has {LENGTH} tokens"),
        ([10**12], f"a window of the model has {LENGTH} tokens"),
        (["é" * (LENGTH // 2), 1], f"is {LENGTH + 1} tokens long, gaps included"),
        ([20, "a", 20], "is 41 tokens long"),
    ],
)
def test_bad_parts(unmasker: TextUnmasker, parts: list[str | int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unmasker.infill(parts)


def test_a_baseline_writes_with_one_module_at_all_levels(
    family_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = family_config("masked_lm", training={"steps": 2}, model={"mask_schedule": "cosine"})
    model: AssembledModel = trained_model(config, tmp_path / "run", "end_to_end")
    unmasker = TextUnmasker(model)
    calls = _Calls(unmasker, monkeypatch)
    assert len(unmasker.generate(2, steps=6)) == 2
    assert calls.blocks == [0] * 6
    assert [np.sin(np.pi / 2 * level) for _, level, _ in calls.seen] == pytest.approx(
        [1 - step / 6 for step in range(6)]
    )
