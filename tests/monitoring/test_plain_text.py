from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.monitoring.plain_text import plain, without_keys


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a block's loss: 0.5", "a block's loss: 0.5"),
        ("Größe 模型", "Größe 模型"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x9b31mred", "red"),
        ("\x9d0;title\x9cafter", "after"),
        ("\x1bPq#0\x1b\\after", "after"),
        ("\x1bcreset", "reset"),
        ("\x1b(0after", "after"),
        ("a\rb\tc\nd", "a b c d"),
        ("a\x07\x08\x00b\x7f", "ab"),
        ("\u202egnp.exe\u200b", "gnp.exe"),
        ("half \ud83d of a pair", "half  of a pair"),
        ("unfinished \x1b[31", "unfinished 31"),
    ],
)
def test_what_a_terminal_would_obey_is_gone(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text(alphabet=st.sampled_from("\x1b\x9b\x9d\x9c\x07\\[]0;mcA\u202e\ud800 é\n")))
def test_nothing_can_be_hidden_in_anything(text: str) -> None:
    cleaned = plain(text)
    assert not set(cleaned) & set("\x1b\x9b\x9d\x9c\x07\n\u202e\ud800")
    cleaned.encode()


def test_addresses_without_their_keys() -> None:
    told = {"run": "s3://KEY:SEC%2FRET@bucket/a?region=b", "seen": ["cannot write gs://me@bucket/a: no", 3, None]}
    assert without_keys(told) == {"run": "s3://bucket/a?region=b", "seen": ["cannot write gs://bucket/a: no", 3, None]}
    assert without_keys("s3://bucket/user@host a@b") == "s3://bucket/user@host a@b"
