"""The live view of a run on a terminal, until somebody leaves it. The run notices nothing of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live

from dbtrain.monitoring.block_page import worker_log
from dbtrain.monitoring.columns import Look
from dbtrain.monitoring.following import Follower, Frame
from dbtrain.monitoring.keys import Keyboard
from dbtrain.monitoring.screen import Page, Screen, draw
from dbtrain.monitoring.sparkline import ASCII, UNICODE, Glyphs
from dbtrain.run_directory import RunDirectory

TICK = 0.5
"""Seconds after which the screen is drawn again anyway: clocks go on, and a window may have another size."""


def glyphs_of(console: Console) -> Glyphs:
    """What the terminal can show."""
    return ASCII if console.options.ascii_only else UNICODE


def watch_run(run: RunDirectory, console: Console, terminal: int, every: float) -> None:
    """Show a run until `q` or Ctrl-C; the terminal is as before then, also after an exception.

    Args:
        run: its directory is read, and nothing is written there. It may vanish and come back.
        console: a terminal.
        terminal: its descriptor, that keys come from.
        every: seconds between two looks at the directory.
    """
    screen = Screen()
    with _no_log_lines(), Follower(run, every) as follower, contextlib.suppress(KeyboardInterrupt, EOFError):
        while not screen.left:
            with _full_screen(console) as live, Keyboard(terminal) as keyboard:
                _show(screen, follower, live, keyboard, terminal)
            if not screen.left:
                os.kill(0, signal.SIGTSTP)  # as the terminal does it; the shell wakes us up


def _show(screen: Screen, follower: Follower, live: Live, keyboard: Keyboard, terminal: int) -> None:
    """Until somebody leaves or suspends."""
    frame, now = follower.newest(), time.time()
    while True:
        _fit(live.console, terminal)
        live.update(_picture(screen, frame, now, live.console), refresh=True)
        for key in keyboard.wait(TICK, follower.descriptor):
            if key == "suspend":
                return
            screen.press(key, frame.view)
        if screen.left:
            return
        newest = follower.newest()
        if not screen.held:
            frame, now = newest, time.time()


def _fit(console: Console, terminal: int) -> None:
    """Take the size that the window has now; COLUMNS and LINES, which go before it elsewhere, may be those of once."""
    with contextlib.suppress(OSError):
        columns, lines = os.get_terminal_size(terminal)
        if columns > 0 and lines > 0:  # some terminals do not know
            console.size = ConsoleDimensions(columns, lines)


def _picture(screen: Screen, frame: Frame, now: float, console: Console) -> Group:
    log = worker_log(frame.view, screen.block(frame.view)) if screen.page is Page.LOG else []
    look = Look(frame.view, now, glyphs_of(console))
    lines = draw(screen, look, frame.problem, log, console.width, console.height)
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
    return Group(*lines)


@contextlib.contextmanager
def _full_screen(console: Console) -> Iterator[Live]:
    """The terminal's other screen; the first one is back afterwards, whatever a signal interrupts."""
    live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    try:
        with live:
            yield live
    finally:
        if console.is_alt_screen:
            console.set_alt_screen(False)
        console.show_cursor()


@contextlib.contextmanager
def _no_log_lines() -> Iterator[None]:
    """The screen says itself what cannot be read; a line of the log would only tear it."""
    logger = logging.getLogger("dbtrain")
    before, logger.handlers = logger.handlers, [logging.NullHandler()]
    try:
        yield
    finally:
        logger.handlers = before
