"""What the verbs share: options, messages on standard error, results on standard output."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dbtrain.errors import UserError

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a field; may be given again.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, last.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="Run directory or URI.", show_default=False)]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def report(message: str) -> None:
    """One line on standard error, plain where it is not a terminal; never wrapped, so that it can be searched for."""
    line = message.replace("\n", " ")
    err.print(Text.assemble(("dbtrain: ", "bold red"), line), soft_wrap=True)


def report_mistake(mistake: UserError) -> None:
    """What the user did wrong, in one line."""
    report(str(mistake))


class ToStandardError(logging.Handler):
    """Log records as lines on standard error, above a live table if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message without time and place."""
        report(f"{record.levelname.lower()}: {record.getMessage()}")


def emit_json(result: dict[str, Any]) -> None:
    """One line, the last on standard output. JSON knows no NaN and no infinity: they become null."""
    sys.stdout.write(json.dumps(_finite(result), allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, the others to the right. Nothing is ever cut, however narrow the terminal."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0), show_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = Measurement.get(out, out.options.update(max_width=1000), table).maximum
    wide = Console(highlight=False, width=max(needed, out.width))
    wide.print(Text(title, style="bold"), soft_wrap=True)
    wide.print(table)
    wide.print()


def whole_number(option: str) -> Callable[[str], int]:
    """A parser for an option that counts something: at least 1."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise UserError("is not a whole number", field=option, value=text) from None
        if value < 1:
            raise UserError("has to be at least 1", field=option, value=value)
        return value

    return parse


def parse_bytes(text: str) -> float:
    """`8GB`, `512 MB`, `2GiB` or a plain number, in bytes. Raises UserError for anything else."""
    units = {
        "": 1,
        "k": 1e3,
        "m": 1e6,
        "g": 1e9,
        "t": 1e12,
        "ki": 2**10,
        "mi": 2**20,
        "gi": 2**30,
        "ti": 2**40,
    }
    lower = text.strip().lower().removesuffix("b")
    number = lower.rstrip("kmgti").strip()
    unit = lower[len(lower.rstrip("kmgti")) :]
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        raise UserError("is not a size", field="--memory", value=text, mend="write 8GB, 512MB or 2GiB") from None
    if not 0 < value < float("inf"):
        raise UserError("has to be above 0", field="--memory", value=text)
    return value
