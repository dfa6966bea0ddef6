"""`dbtrain sample` of language models: what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import assert_refused, dbtrain, unchanged


def test_going_on_from_prompts(texts: Path, place: Path) -> None:
    asked = ("sample", texts / "causal_lm", "--prompt", "The ", "--prompt", "A", "--tokens", 5)
    said = dbtrain(*asked, "--json").json()
    assert [text["prompt"] for text in said["texts"]] == ["The ", "A"]
    assert dbtrain(*asked).stdout == "".join(f"{text['prompt']}{text['text']}\n\n" for text in said["texts"])
    assert dbtrain(*asked, "--seed", 1, "--json").json() != said
    whole = dbtrain("sample", texts / "baseline", "--prompt", "The ", "--tokens", 5, "--greedy")
    assert whole.stdout.startswith("The ")


def test_filling_in(texts: Path, place: Path) -> None:
    said = dbtrain("sample", texts / "masked_lm", "--infill", "to [[3]] be", "--json").json()["texts"]
    assert said[0]["text"].startswith("to ")
    assert said[0]["text"].endswith(" be")
    assert len(dbtrain("sample", texts / "masked_lm", "--count", 2, "--json").json()["texts"]) == 2


REFUSED = {
    "no prompt": ("causal_lm", [], ["--prompt", "is needed"]),
    "an empty prompt": ("causal_lm", ["--prompt", ""], ["--prompt", "is empty"]),
    "a prompt that fills the window": ("causal_lm", ["--prompt", "x" * 32], ["--prompt", "32"]),
    "more tokens than fit": ("causal_lm", ["--prompt", "x", "--tokens", "32"], ["--tokens = 32", "31"]),
    "no steps": ("causal_lm", ["--prompt", "x", "--steps", "0"], ["--steps = 0", "at least 1"]),
    "steps that skip blocks": (
        "causal_lm",
        ["--prompt", "x", "--steps", "2"],
        ["2", "would skip some of the 3 blocks"],
    ),
    "no temperature": ("causal_lm", ["--prompt", "x", "--temperature", "0"], ["--temperature = 0.0"]),
    "no nucleus": ("causal_lm", ["--prompt", "x", "--top-p", "nan"], ["--top-p = nan"]),
    "a read-out that is not": ("causal_lm", ["--prompt", "x", "--readout", "best"], ["--readout = 'best'"]),
    "a prompt for a masked model": (
        "masked_lm",
        ["--prompt", "x"],
        ["--prompt", "of no use to a masked_lm", "--infill"],
    ),
    "an option of images": ("masked_lm", ["--guidance", "2"], ["--guidance = 2.0", "of no use to a masked_lm"]),
    "a gap that is open": ("masked_lm", ["--infill", "a [[3"], ["--infill = 'a [[3'", "write [[12]]"]),
    "a gap of a letter": ("masked_lm", ["--infill", "[[²]]"], ["--infill = '[[²]]'", "write [[12]]"]),
    "a gap of many digits": ("masked_lm", ["--infill", f"[[{'9' * 5000}]]"], ["--infill", "write [[12]]"]),
    "a gap longer than the window": ("masked_lm", ["--infill", "[[33]]"], ["--infill", "33", "32"]),
    "masked, no steps": ("masked_lm", ["--steps", "0"], ["--steps = 0", "at least 1"]),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes(texts: Path, place: Path, mistake: str) -> None:
    run, options, expected = REFUSED[mistake]
    with unchanged(place):
        assert_refused(dbtrain("sample", texts / run, *options), *expected)
