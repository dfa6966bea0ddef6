"""`dbtrain prepare` for text and latents: what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import assert_refused, dbtrain, unchanged


def test_text_tells_what_to_write_into_the_configuration(place: Path) -> None:
    (place / "play.txt").write_text("to be or not to be\n" * 300)
    result = dbtrain("prepare", "play.txt", "--length", 32)
    assert result.stdout == (
        "data/play: 160 train, 17 test windows of 32 tokens from 2 documents (38 tokens left over),"
        " byte tokenizer of 257 ids\n"
    )
    assert "data: {source: play, path: data/play}" in result.stderr
    assert "model: {length: 32, vocab_size: 257}" in result.stderr


def test_text_as_json(place: Path) -> None:
    made = dbtrain("prepare", "topics", "--tokenizer", "bpe", "--vocab-size", 300, "--json").json()
    assert (made["kind"], made["path"]) == ("text", "data/topics")
    assert (made["text"]["vocab_size"], made["text"]["tokenizer"], made["text"]["length"]) == (300, "bpe", 256)
    assert made["text"]["splits"]["train"]["tokens"] >= made["rows"]["train"] * 256
    assert (place / "data" / "topics" / "tokenizer.json").is_file()


@pytest.mark.parametrize("labelled", [True, False])
def test_latents_tell_what_to_write_into_the_configuration(place: Path, labelled: bool) -> None:
    values = np.random.default_rng(0).normal(size=(20, 4, 8, 8)).astype(np.float16)
    columns: dict[str, pa.Array] = {"latent": pa.FixedShapeTensorArray.from_numpy_ndarray(values)}
    if labelled:
        columns["label"] = pa.array([0, 1] * 10)
    pq.write_table(pa.table(columns), place / "cats.parquet")
    result = dbtrain("prepare", "cats.parquet")
    classes = "2 classes" if labelled else "no classes"
    assert result.stdout == f"data/cats: 18 train, 2 test latents of 4x8x8, {classes}\n"
    field = ", num_classes: 2" if labelled else ""
    assert f"model: {{image_size: 8, channels: 4{field}}}\n" in result.stderr


MISTAKES = {
    "size of text": (["topics", "--size", "8"], "--size = 8", "does not apply to the topics", "--length"),
    "length of images": (["digits", "--length", "8"], "--length = 8", "does not apply to the digits"),
    "length 1": (["topics", "--length", "1"], "--length = 1", "at least 2"),
    "length of letters": (["topics", "--length", "long"], "--length = 'long'", "not a whole number"),
    "a window longer than the text": (["topics", "--length", "1000000"], "--length = 1000000", "fills no window"),
    "an unknown tokenizer": (["topics", "--tokenizer", "wordy"], "--tokenizer = 'wordy'", "byte, bpe, or the path"),
    "a tokenizer that is none": (["topics", "--tokenizer", "wrong.json"], "wrong.json", "is not a tokenizer file"),
    "vocabulary of bytes": (["topics", "--vocab-size", "99"], "--vocab-size = 99", "add --tokenizer bpe"),
    "a small vocabulary": (["topics", "--tokenizer", "bpe", "--vocab-size", "9"], "--vocab-size = 9", "at least 257"),
    "not UTF-8": (["latin.txt"], "latin.txt", "not UTF-8 at byte 1"),
    "a broken line": (["lines.jsonl"], "lines.jsonl, line 2", "is not JSON"),
    "two kinds of text": (["mixed"], "SOURCE = 'mixed'", "has JSON lines (a.jsonl) and text files (b.txt)"),
    "a file of no kind": (["program.py"], "SOURCE = 'program.py'", "is neither text (.txt, .md), JSON lines"),
    "another key": (["good.jsonl", "--text-column", "body"], "good.jsonl, line 1", "no string under 'body'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(place: Path, mistake: str) -> None:
    (place / "latin.txt").write_bytes(b"a\xe9")
    (place / "lines.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (place / "good.jsonl").write_text('{"text": "a"}\n')
    (place / "wrong.json").write_text("{}")
    (place / "program.py").write_text("print(1)\n")
    (place / "mixed").mkdir()
    for name in ("a.jsonl", "b.txt", "README.md"):
        (place / "mixed" / name).write_text('{"text": "a"}\n')
    arguments, *expected = MISTAKES[mistake]
    with unchanged(place):
        assert_refused(dbtrain("prepare", *arguments, "--out", "shards"), *expected)
