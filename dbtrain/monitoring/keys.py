"""Reading single keys from a terminal, which is as it was before when that is over, however it ends."""

from __future__ import annotations

import contextlib
import os
import re
import select
import termios
import tty
from types import TracebackType
from typing import Any

# What terminals send for the keys beyond characters: xterm's sequences, its application mode, those of the console.
_SEQUENCES = {
    "[A": "up",
    "OA": "up",
    "[B": "down",
    "OB": "down",
    "[5~": "page up",
    "[6~": "page down",
    "[H": "home",
    "OH": "home",
    "[1~": "home",
    "[7~": "home",
    "[F": "end",
    "OF": "end",
    "[4~": "end",
    "[8~": "end",
}
_NAMES = {"\r": "enter", "\n": "enter", "\x1a": "suspend", "\x04": "q"}
_SEQUENCE = re.compile(r"\[[0-?]*[ -/]*[@-~]|O[ -~]")
_UNFINISHED = re.compile(r"(?:\[[0-?]*[ -/]*|O)?")
_REST = 0.05
"""Seconds in which the rest of a sequence comes; an Escape after which nothing comes is the key itself."""


class Keyboard:
    """The keys of a terminal while it is entered: unechoed, each at once. Ctrl-C still interrupts."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._before: list[Any] = []

    def __enter__(self) -> Keyboard:
        self._before = termios.tcgetattr(self._descriptor)
        try:
            tty.setcbreak(self._descriptor)
            mode = termios.tcgetattr(self._descriptor)
            # Ctrl-Z comes as a key: who draws a screen has to leave it before the shell takes over.
            mode[6][termios.VSUSP] = os.fpathconf(self._descriptor, "PC_VDISABLE").to_bytes(1, "little")
            termios.tcsetattr(self._descriptor, termios.TCSANOW, mode)
        except BaseException:  # a signal
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)

    def wait(self, seconds: float, also: int) -> list[str]:
        """The keys that are pressed, by name; none when `seconds` pass or the descriptor `also` has something first.

        Raises:
            EOFError: the terminal is gone.
        """
        ready, _, _ = select.select([self._descriptor, also], [], [], seconds)
        if self._descriptor not in ready:
            return []
        data = self._read()
        while unfinished(data) and select.select([self._descriptor], [], [], _REST)[0]:
            data += self._read()
        return parse_keys(data)

    def _read(self) -> bytes:
        try:
            data = os.read(self._descriptor, 1024)
        except OSError as error:  # what Linux says of a terminal that hung up
            raise EOFError from error
        if not data:
            raise EOFError
        return data


def unfinished(data: bytes) -> bool:
    """Whether more may come that belongs to the last key."""
    start = data.rfind(b"\x1b")
    return start >= 0 and _UNFINISHED.fullmatch(data[start + 1 :].decode("latin-1")) is not None


def parse_keys(data: bytes) -> list[str]:
    """What a terminal sent, as names of keys: `up`, `enter`, `escape`, or the character. Unknown ones are left out."""
    text, keys, place = data.decode(errors="ignore"), [], 0
    while place < len(text):
        char = text[place]
        place += 1
        if char == "\x1b":
            if match := _SEQUENCE.match(text, place):
                place = match.end()
                if match[0] in _SEQUENCES:
                    keys.append(_SEQUENCES[match[0]])
            else:
                keys.append("escape")
        elif char in _NAMES:
            keys.append(_NAMES[char])
        elif char.isprintable():
            keys.append(char)
    return keys
