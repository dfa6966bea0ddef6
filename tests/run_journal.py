"""Reading the journal of a run that another process may be writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of the journal with that event; none before there is one."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in found if line["event"] == name]
