from __future__ import annotations

from pathlib import Path

from object_store import ObjectStore

from dbtrain.monitoring.lines import LineFollower
from dbtrain.storage import Storage


def test_every_line_once_and_no_half_ones(tmp_path: Path) -> None:
    follower = LineFollower(Storage.open(tmp_path), "a.jsonl")
    assert follower.read() == []
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n{"n"')
    assert follower.read() == [{"n": 1}, {"n": 2}]
    assert follower.read() == []
    with path.open("ab") as file:
        file.write(b': "\xc3\xa9"}\n')
    assert follower.read() == [{"n": "é"}]


def test_what_is_no_object_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\x00\x00\xff\n[1]\n\n{"n": NaN}\n{"torn\n{"n": 3}\n')
    lines = LineFollower(Storage.open(tmp_path), "a.jsonl").read()
    assert [list(line) for line in lines] == [["n"], ["n"]]
    assert lines[1] == {"n": 3}


def test_a_line_that_is_nested_beyond_measure_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n":' * 100_000 + '\n{"n": 1}\n')
    assert LineFollower(Storage.open(tmp_path), "a.jsonl").read() == [{"n": 1}]


def test_remote_files_are_followed_too(object_store: ObjectStore) -> None:
    follower = LineFollower(Storage.open(object_store.uri("run")), "a.jsonl")
    assert follower.read() == []
    path = object_store.folder / "run/a.jsonl"
    path.parent.mkdir()
    for number in range(3):
        with path.open("a") as file:
            file.write(f'{{"n": {number}}}\n')
        assert follower.read() == [{"n": number}]
