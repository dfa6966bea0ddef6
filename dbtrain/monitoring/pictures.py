"""Pictures that a page may show: those that `dbtrain sample` left in a run directory, and what is a picture at all."""

from __future__ import annotations

import contextlib

from dbtrain.run_directory import RunDirectory

KEPT = "samples/samples.png"
"""Of a run, by `dbtrain sample`."""
PROMPT = "The "
"""What drawn texts go on from where nobody says."""
LARGEST = 8_000_000
"""Bytes of a picture that is shown."""
_PNG = b"\x89PNG\r\n\x1a\n"


def kept_png(run: RunDirectory) -> bytes | None:
    """The picture in the run directory; None where there is none that can be shown."""
    with contextlib.suppress(OSError):
        if run.storage.exists(KEPT):
            return checked_png(run.storage.read_bytes(KEPT))
    return None


def checked_png(data: bytes) -> bytes | None:
    """`data` if it is a PNG of a size that can be shown."""
    return data if data.startswith(_PNG) and len(data) <= LARGEST else None
