"""Files and numbers that nobody writes on purpose: one message each, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dbtrain.data.prepare import prepare
from dbtrain.data.shards import ShardSet
from dbtrain.errors import UserError


def _refused(source: Path, message: str, **options: object) -> UserError:
    target = source.parent / "shards"
    with pytest.raises(UserError, match=message) as caught:
        prepare(str(source), target, **{"length": 8, **options})  # type: ignore[arg-type]
    assert not target.exists()
    return caught.value


@pytest.mark.parametrize("large", [False, True])
def test_a_column_of_strings_that_are_not_utf8(large: bool, tmp_path: Path) -> None:
    """Arrow does not look into strings that it reads."""
    rows = pa.array(
        [b"good text " * 4] * 20 + [b"caf\xe9"] + [b"good"] * 20, pa.large_binary() if large else pa.binary()
    )
    kind = pa.LargeStringArray if large else pa.StringArray
    column = kind.from_buffers(len(rows), *rows.buffers()[1:])
    pq.write_table(pa.table({"text": column}), tmp_path / "all.parquet")
    error = _refused(tmp_path / "all.parquet", "is not UTF-8")
    assert error.value == f"{tmp_path}/all.parquet, row 21"
    assert "'text'" in str(error)


def test_json_too_deep_to_read(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text('{"text": "good"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert _refused(path, "is not JSON: it is nested too deeply").value == f"{path}, line 2"


def test_a_byte_order_mark_before_json_lines(tmp_path: Path) -> None:
    """Some editors put it in front of every file; it is no part of the text."""
    lines = "".join(f'{{"text": "number {index} of the lines"}}\n' for index in range(40)).encode()
    shards = []
    for name, data in (("plain", lines), ("marked", b"\xef\xbb\xbf" + lines)):
        (tmp_path / f"{name}.jsonl").write_bytes(data)
        prepare(str(tmp_path / f"{name}.jsonl"), tmp_path / name, length=8)
        opened = ShardSet.open(tmp_path / name, "train")
        shards.append(opened.gather("tokens", np.arange(opened.rows)))
    assert np.array_equal(*shards)
    (tmp_path / "inside.jsonl").write_bytes(lines + b"\xef\xbb\xbf" + lines)
    assert _refused(tmp_path / "inside.jsonl", "is not JSON").value == f"{tmp_path}/inside.jsonl, line 41"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 10**30}, "--length = 10{30}: has to be at most"),
        ({"length": 2**63}, "--length = 9223372036854775808: has to be at most"),
        ({"tokenizer": "bpe", "vocab_size": 10**30}, "--vocab-size = 10{30}: has to be at most"),
        ({"tokenizer": "bpe", "vocab_size": 2**40}, "--vocab-size = 1099511627776: has to be at most"),
    ],
)
def test_numbers_beyond_all_bounds(options: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("to be or not to be " * 40)
    _refused(tmp_path / "all.txt", message, **options)
