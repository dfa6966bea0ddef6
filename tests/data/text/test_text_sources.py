from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import png, random_pixels, write_parquet

from dbtrain.data.manifest import Manifest
from dbtrain.data.prepare import prepare
from dbtrain.data.shards import ShardSet
from dbtrain.data.text.tokenizer import load_tokenizer
from dbtrain.errors import CorruptData, UserError

DOCUMENTS = [f"document {number}: " + chr(97 + number % 26) * (10 + number) + " ü€\r\n" for number in range(30)]

# Written down once: with another choice, a model would be tested on what it was trained on before.
HELD_OUT = [13, 26, 29]


def content(folder: Path, split: str) -> bytes:
    """The stream that was packed, separators as byte 0xFF, which UTF-8 never has."""
    data = ShardSet.open(folder, split)  # type: ignore[arg-type]
    tokens = data.gather("tokens", np.arange(data.rows)).ravel()
    return bytes(np.where(tokens == 256, 255, tokens).astype(np.uint8))


def stream(documents: Sequence[str], length: int) -> bytes:
    """What should have been packed into windows of that length."""
    whole = b"".join(text.encode() + b"\xff" for text in documents)
    return whole[: len(whole) // length * length]


def failure(source: Path | str, tmp_path: Path, **options: object) -> UserError:
    out = tmp_path / "shards"
    with pytest.raises(UserError) as caught:
        prepare(str(source), out, **options)  # type: ignore[arg-type]
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return caught.value


def as_files(root: Path, texts: Sequence[str]) -> Path:
    for number, text in enumerate(texts):
        path = root / f"part{number // 10}" / f"{number:03d}.{'md' if number % 2 else 'txt'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


def as_lines(root: Path, texts: Sequence[str]) -> Path:
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
    root.mkdir()
    (root / "all.jsonl").write_text("\n\n".join(lines))
    return root / "all.jsonl"


def as_parquet(root: Path, texts: Sequence[str]) -> Path:
    root.mkdir()
    pq.write_table(pa.table({"text": list(texts), "n": list(range(len(texts)))}), root / "all.parquet")
    return root / "all.parquet"


@pytest.mark.parametrize("write", [as_files, as_lines, as_parquet], ids=lambda write: write.__name__)
def test_every_source_holds_the_same_tenth_out(write: Callable[[Path, Sequence[str]], Path], tmp_path: Path) -> None:
    manifest = prepare(str(write(tmp_path / "source", DOCUMENTS)), tmp_path / "shards", length=32, shard_bytes=500)
    assert manifest.text is not None
    assert (manifest.text.splits["train"].documents, manifest.text.splits["test"].documents) == (27, 3)
    assert len(manifest.splits["train"].shards) > 3
    train, test = content(tmp_path / "shards", "train"), content(tmp_path / "shards", "test")
    # The last one is cut where its window ends; it still shows which it is.
    held = [number for number, text in enumerate(DOCUMENTS) if text[:12].encode() in test]
    assert held == HELD_OUT
    assert test == stream([DOCUMENTS[number] for number in held], 32)
    assert train == stream([text for number, text in enumerate(DOCUMENTS) if number not in held], 32)


def test_a_single_document_gives_its_last_tenth(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(200))
    (tmp_path / "play.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    manifest = prepare(str(tmp_path / "play.txt"), tmp_path / "shards", length=16)
    cut = len(text) * 9 // 10
    assert content(tmp_path / "shards", "train") == stream([text[:cut]], 16)
    assert content(tmp_path / "shards", "test") == stream([text[cut:]], 16)
    assert manifest.source == str(tmp_path / "play.txt")
    assert (manifest.class_names, manifest.mean, manifest.std) == ((), (), ())


@pytest.mark.parametrize(
    "names",
    [
        {"train.txt": "t", "test.txt": "v", "README.md": "x"},
        {"train/a.txt": "t", "valid/deep/b.txt": "v"},
        {"train-0.txt": "t", "val-0.txt": "v", ".hidden.txt": "x"},
        {"train/a.txt": "t", "test/b.txt": "v", "validation/c.txt": "x"},
    ],
)
def test_splits_that_the_names_tell(names: dict[str, str], tmp_path: Path) -> None:
    for name, letter in names.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(letter * 50)
    prepare(str(tmp_path / "source"), tmp_path / "shards", length=10)
    assert content(tmp_path / "shards", "train") == b"t" * 50
    assert content(tmp_path / "shards", "test") == b"v" * 50


def test_splits_in_json_lines_and_parquet(tmp_path: Path) -> None:
    for kind in ("jsonl", "parquet"):
        root = tmp_path / kind
        root.mkdir()
        for split, letter in (("train", "t"), ("validation", "v")):
            if kind == "jsonl":
                (root / f"{split}.jsonl").write_text(json.dumps({"body": letter * 50}))
            else:
                pq.write_table(
                    pa.table({"body": [letter * 50, None, ""], "title": ["a"] * 3}), root / f"{split}.parquet"
                )
        prepare(str(root), tmp_path / f"{kind}-shards", length=10, text_column="body")
        assert content(tmp_path / f"{kind}-shards", "train") == b"t" * 50
        assert content(tmp_path / f"{kind}-shards", "test") == b"v" * 50


def test_a_file_beside_the_splits(tmp_path: Path) -> None:
    for name in ("train.txt", "test.txt", "chapter1.txt"):
        (tmp_path / name).write_text("x" * 50)
    assert "chapter1.txt, which is for neither" in str(failure(tmp_path, tmp_path, length=10))


def test_names_that_tell_one_split_only_are_names_of_documents(tmp_path: Path) -> None:
    for name in ("test-plan.md", "trainee.md", "other.md"):
        (tmp_path / name).write_text("x" * 50)
    manifest = prepare(str(tmp_path), tmp_path / "shards", length=10)
    assert manifest.text is not None
    assert [part.documents for part in manifest.text.splits.values()] == [2, 1]


def test_captions_beside_images_when_their_column_is_named(tmp_path: Path) -> None:
    images, captions = [png(image) for image in random_pixels(20)], [f"caption {number}" for number in range(20)]
    path = tmp_path / "train.parquet"
    write_parquet(path, images, [0, 1] * 10, extra={"caption": captions})
    assert prepare(str(path), tmp_path / "images").kind == "image"
    assert prepare(str(path), tmp_path / "text", text_column="caption", length=8).kind == "text"


def test_topics(tmp_path: Path) -> None:
    manifest = prepare("topics", tmp_path / "shards", length=64)
    assert manifest.text is not None
    assert sum(part.documents for part in manifest.text.splits.values()) > 50
    assert b"The Python" in content(tmp_path / "shards", "train")


# Tokenizers


def test_bpe_is_trained_on_the_training_text_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("common words " * 200)
    (tmp_path / "test.txt").write_text("zyzzyva " * 200)
    manifest = prepare(str(tmp_path), tmp_path / "shards", length=16, tokenizer="bpe", vocab_size=300)
    tokenizer = load_tokenizer(tmp_path / "shards")
    facts = manifest.facts()
    assert manifest.text is not None
    assert facts.tokenizer_sha256 == hashlib.sha256(tokenizer.to_bytes()).hexdigest()
    assert (facts.vocab_size, facts.separator) == (tokenizer.vocab_size, tokenizer.separator)
    assert b" common" in tokenizer.token_bytes
    assert not [spelt for spelt in tokenizer.token_bytes if len(spelt) > 1 and b"z" in spelt]
    data = ShardSet.open(tmp_path / "shards", "test")
    assert tokenizer.decode(data.gather("tokens", np.arange(data.rows)).ravel()).startswith("zyzzyva zyzzyva")


def test_a_tokenizer_from_a_file_gives_the_same_shards(tmp_path: Path) -> None:
    source = as_lines(tmp_path / "source", DOCUMENTS)
    options = {"length": 16, "tokenizer": "bpe", "vocab_size": 300}
    trained = prepare(str(source), tmp_path / "a", **options)  # type: ignore[arg-type]
    loaded = prepare(str(source), tmp_path / "b", length=16, tokenizer=str(tmp_path / "a" / "tokenizer.json"))
    assert trained == loaded
    in_bytes = prepare(str(source), tmp_path / "c", length=16)
    assert in_bytes.facts().sha256 != trained.facts().sha256


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("--tokenizer", {"tokenizer": "nowhere.json"}),
        ("--tokenizer", {"tokenizer": __file__}),
        ("--vocab-size", {"vocab_size": 300}),
        ("--vocab-size", {"vocab_size": 100, "tokenizer": "bpe"}),
        ("--length", {"length": 1}),
        ("--size", {"size": 8}),
        ("--channels", {"channels": 3}),
        ("--label-column", {"label_column": "label"}),
        ("--text-column", {"text_column": "body"}),
    ],
)
def test_options_that_do_not_apply(field: str, options: dict[str, object], tmp_path: Path) -> None:
    assert failure("topics", tmp_path, **options).field == field


def test_options_of_text_do_not_apply_to_images(parquet_source: Path, tmp_path: Path) -> None:
    for name, value in (("length", 8), ("tokenizer", "byte"), ("vocab_size", 300)):
        error = failure(parquet_source, tmp_path, **{name: value})
        assert error.field == f"--{name.replace('_', '-')}"
        assert "does not apply to Parquet of images" in str(error)
    assert failure("digits", tmp_path, size=16).field == "--size"


# Damage


def test_text_shorter_than_a_window_says_which_would_do(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x" * 500)
    (tmp_path / "test.txt").write_text("x" * 99)
    error = failure(tmp_path, tmp_path, length=101)
    assert error.field == "--length"
    assert "the text for testing has 100 tokens" in str(error)
    assert "pass --length 100 or less" in str(error)
    prepare(str(tmp_path), tmp_path / "shards", length=100)


@pytest.mark.parametrize("text", ["", "\ufeff"])
def test_no_text_at_all(text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(text)
    assert "has 0 tokens" in str(failure(tmp_path / "empty.txt", tmp_path))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    error = failure(tmp_path / "latin.txt", tmp_path)
    assert error.value == tmp_path / "latin.txt"
    assert "is not UTF-8 at byte 3" in str(error)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "abc"}\n\n{"text": "caf\xe9"}\n')
    assert "is not UTF-8 at byte 30" in str(failure(tmp_path / "latin.jsonl", tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no string under 'text'"),
        ('{"body": "x"}', "--text-column"),
        ('{"text": null}', "has no string under 'text'"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_json_lines_with_a_broken_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text('{"text": "good"}\n' * 40 + f"\n{line}\n" + '{"text": "good"}\n' * 40)
    error = failure(path, tmp_path)
    assert error.value == f"{path}, line 42"
    assert message in str(error)


def test_columns_that_cannot_be_told_apart(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x"], "b": ["y"], "n": [1]}), tmp_path / "all.parquet")
    assert "--text-column" in str(failure(tmp_path / "all.parquet", tmp_path))
    error = failure(tmp_path / "all.parquet", tmp_path, text_column="n")
    assert "columns of strings: a, b" in str(error)


def test_a_tokenizer_that_is_not_the_one_the_text_was_prepared_with(tmp_path: Path) -> None:
    prepare("topics", tmp_path / "shards", length=64)
    data = ShardSet.open(tmp_path / "shards", "train")
    data.verify()
    path = tmp_path / "shards" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CorruptData, match="bytes have changed"):
        data.verify()
    path.unlink()
    with pytest.raises(UserError, match="the tokenizer is missing"):
        data.verify()


def test_a_manifest_that_does_not_fit_the_windows(tmp_path: Path) -> None:
    prepare("topics", tmp_path / "shards", length=64)
    path = tmp_path / "shards" / "manifest.json"
    raw = json.loads(path.read_text())
    raw["text"] |= {"vocab_size": 256, "separator": 255}
    raw["columns"][0]["dtype"] = "uint8"
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptData, match=r"not \(tokens uint8 64"):
        ShardSet.open(tmp_path / "shards", "train")
    raw["text"] |= {"vocab_size": 300}
    raw["columns"][0]["dtype"] = "uint16"
    raw["text"]["splits"]["train"]["tokens"] += 1
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptData, match="do not add up"):
        Manifest.load(tmp_path / "shards")


def test_a_token_outside_the_vocabulary(tmp_path: Path) -> None:
    prepare("topics", tmp_path / "shards", length=64, tokenizer="bpe", vocab_size=400)
    path = tmp_path / "shards" / "manifest.json"
    raw = json.loads(path.read_text())
    raw["text"]["vocab_size"] = 399
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptData, match=r"has the token 399, outside 0\.\.398"):
        ShardSet.open(tmp_path / "shards", "train").verify()
