from __future__ import annotations

import os
import termios
from collections.abc import Iterator

import pytest

from dbtrain.monitoring.keys import Keyboard, parse_keys, unfinished

PATIENCE = 60.0  # seconds


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of one: what is typed is written to the first."""
    typist, terminal = os.openpty()
    yield typist, terminal
    for descriptor in (typist, terminal):
        os.close(descriptor)


@pytest.fixture
def silent() -> Iterator[int]:
    """A descriptor that never has anything."""
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"s", ["s"]),
        (b"qG?", ["q", "G", "?"]),
        (b"\x1b[A\x1bOB\x1b[6~", ["up", "down", "page down"]),
        (b"\x1b[H\x1b[4~", ["home", "end"]),
        (b"\r\n\x1a", ["enter", "enter", "suspend"]),
        (b"\x1b", ["escape"]),
        (b"\x1bq", ["escape", "q"]),
        (b"\x1b[1;5Cq", ["q"]),  # Ctrl and right: nothing to us, and no letters of it either
        (b"\x1b[<0;10;10Mq", ["q"]),
        ("é".encode(), ["é"]),
        (b"\xff\x01q", ["q"]),
    ],
)
def test_what_a_terminal_sends(data: bytes, keys: list[str]) -> None:
    assert parse_keys(data) == keys


@pytest.mark.parametrize(("data", "more"), [(b"\x1b", True), (b"q\x1b[5", True), (b"\x1b[A", False), (b"q", False)])
def test_a_sequence_that_comes_in_parts_is_waited_for(data: bytes, more: bool) -> None:
    assert unfinished(data) is more


def test_keys_come_at_once_and_the_terminal_is_as_before(terminal: tuple[int, int], silent: int) -> None:
    typist, descriptor = terminal
    before = termios.tcgetattr(descriptor)
    with pytest.raises(ValueError, match="as it may happen"), Keyboard(descriptor) as keyboard:  # noqa: PT012
        os.write(typist, b"s\x1b[A\x1a")
        assert keyboard.wait(PATIENCE, silent) == ["s", "up", "suspend"]
        os.write(typist, b"\x1b")
        assert keyboard.wait(PATIENCE, silent) == ["escape"]
        assert keyboard.wait(0, silent) == []
        flags = termios.tcgetattr(descriptor)[3]
        assert not flags & (termios.ECHO | termios.ICANON)
        assert flags & termios.ISIG  # Ctrl-C still interrupts
        raise ValueError("as it may happen")
    assert termios.tcgetattr(descriptor) == before


def test_news_end_the_waiting(terminal: tuple[int, int]) -> None:
    read, write = os.pipe()
    with Keyboard(terminal[1]) as keyboard:
        os.write(write, b".")
        assert keyboard.wait(PATIENCE, read) == []
    os.close(read)
    os.close(write)


def test_a_terminal_that_is_gone(silent: int) -> None:
    typist, descriptor = os.openpty()
    with Keyboard(descriptor) as keyboard:
        os.close(typist)
        with pytest.raises(EOFError):
            keyboard.wait(PATIENCE, silent)
    os.close(descriptor)
