"""Text made fit for others to see: what others wrote may hold escape sequences, and addresses may hold keys."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# Of ECMA-48: control sequences, such as colours; strings that end with BEL or ST, such as titles; all others.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[PX\]^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
# Control characters, invisible ones that reorder text, halves of surrogate pairs, line and paragraph separators.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

_KEYS = re.compile(r"://[^/@\s<>&]+@")
"""The key and the secret of an address such as s3://KEY:SECRET@bucket/run."""


def plain(text: str) -> str:
    """One line without anything that a terminal obeys; blanks of all kinds become spaces."""
    if text.isascii() and text.isprintable():
        return text
    text = _ESCAPES.sub("", text)
    text = "".join(" " if char in "\t\n\v\f\r" else char for char in text)
    return "".join(char for char in text if unicodedata.category(char) not in _UNPRINTABLE)


def without_keys(value: Any) -> Any:
    """Plain data, such as text, whose addresses have no keys any more: for all that others get to see."""
    if isinstance(value, str):
        return _KEYS.sub("://", value)
    if isinstance(value, dict):
        return {name: without_keys(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_keys(item) for item in value]
    return value
