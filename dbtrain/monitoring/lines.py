"""Following files of JSON lines that somebody else is writing."""

from __future__ import annotations

import json
from typing import Any

from dbtrain.storage import Storage


class LineFollower:
    """Gives each line of a growing file once. Torn lines, and what is no JSON object, are left out."""

    def __init__(self, storage: Storage, rel: str):
        self._storage = storage
        self._rel = rel
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The lines that were finished since the last call; none while there is no file.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            data = self._storage.read_from(self._rel, self._offset)
        except (FileNotFoundError, NotADirectoryError):
            return []
        whole = data[: data.rfind(b"\n") + 1]  # the rest is being written
        self._offset += len(whole)
        return [record for line in whole.splitlines() if (record := _parse(line)) is not None]


def is_time(value: object) -> bool:
    """Whether it is a time in seconds since 1970 that a calendar has."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e11


def is_count(value: object) -> bool:
    """Whether it is a whole number from 0 on that a float can hold, such as a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
