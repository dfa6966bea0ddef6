"""Where documents come from: files, JSON lines, columns of Parquet, the standard library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from dbtrain.data.sources.tables import Tables
from dbtrain.errors import UserError

DEFAULT_COLUMN = "text"
_MARK = "\ufeff"


class Documents(Protocol):
    """Texts in a fixed order, which can be gone through more than once. Empty ones count in the length."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __iter__(self) -> Iterator[str]:
        """One after the other."""
        ...


class TextFiles:
    """A document a file."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __len__(self) -> int:
        """How many."""
        return len(self._paths)

    def __iter__(self) -> Iterator[str]:
        """Contents, byte for byte but for a byte-order mark.

        Raises:
            UserError: a file is not UTF-8 or cannot be read.
        """
        for path in self._paths:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise UserError(f"cannot be read: {error.strerror}", field="file", value=path) from None
            yield _utf8(data, path, 0).removeprefix(_MARK)


class JsonLines:
    """A document a line, as the string under one key."""

    def __init__(self, paths: Sequence[Path], key: str | None):
        self._paths = paths
        self._key = key if key is not None else DEFAULT_COLUMN

    def __len__(self) -> int:
        """How many lines that are not blank."""
        return sum(1 for _ in self._lines())

    def __iter__(self) -> Iterator[str]:
        """Strings under the key.

        Raises:
            UserError: a line is not UTF-8, not JSON, or has no string there; the message has its number.
        """
        for path, number, offset, line in self._lines():
            where = f"{path}, line {number}"
            try:
                text = _utf8(line, path, offset)
                value = json.loads(text.removeprefix(_MARK) if offset == 0 else text)
            except (ValueError, RecursionError) as error:
                reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
                raise UserError(
                    f"is not JSON: {reason}", field="line", value=where, mend="mend or remove the line"
                ) from None
            found = value.get(self._key) if isinstance(value, dict) else None
            if not isinstance(found, str):
                raise UserError(
                    f"has no string under {self._key!r}",
                    field="line",
                    value=where,
                    mend="name the key that has the text with --text-column",
                )
            try:
                found.encode()
            except UnicodeEncodeError:
                raise UserError(
                    "has half of a surrogate pair in its text", field="line", value=where, mend="mend or remove it"
                ) from None
            yield found

    def _lines(self) -> Iterator[tuple[Path, int, int, bytes]]:
        """Path, number, first byte and content of every line that is not blank."""
        for path in self._paths:
            offset = 0
            try:
                with path.open("rb") as file:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            yield path, number, offset, line
                        offset += len(line)
            except OSError as error:
                raise UserError(f"cannot be read: {error.strerror}", field="file", value=path) from None


class TableText:
    """A document a row of Parquet or Arrow files."""

    def __init__(self, tables: Tables, paths: Sequence[str], column: str):
        self._tables = tables
        self._paths = paths
        self._column = column

    def __len__(self) -> int:
        """How many rows."""
        return sum(map(self._tables.rows, self._paths))

    def __iter__(self) -> Iterator[str]:
        """Strings of the column; a null is an empty document.

        Raises:
            UserError: a file cannot be read, or a string in it is not UTF-8, which Arrow does not look at.
        """
        for path in self._paths:
            row = 0
            for batch in self._tables.batches(path, [self._column]):
                for scalar in batch.column(0):
                    row += 1
                    yield self._string(scalar, path, row)

    def _string(self, scalar: Any, path: str, row: int) -> str:
        try:
            text: str | None = scalar.as_py()
        except UnicodeDecodeError as error:
            raise UserError(
                f"is not UTF-8 at byte {error.start} of its {self._column!r}",
                field="row",
                value=f"{path}, row {row}",
                mend="write the column again as UTF-8",
            ) from None
        return text if text is not None else ""


def text_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """The column of documents: the one asked for, else `text`, else the only one of strings.

    Raises:
        UserError: there is no such column of strings.
    """
    names = [field.name for field in schema if _is_string(field.type)]
    if wanted is not None and wanted not in names:
        raise UserError(
            "is not a column of strings in the source",
            field="--text-column",
            value=wanted,
            mend=f"columns of strings: {', '.join(names) or 'none'}",
        )
    if wanted is not None:
        return wanted
    return DEFAULT_COLUMN if DEFAULT_COLUMN in names else names[0] if len(names) == 1 else None


def topics() -> list[str]:
    """Python's reference on its own keywords and types, which comes with the standard library; by topic."""
    from pydoc_data.topics import topics as texts

    return [texts[name] for name in sorted(texts)]


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _utf8(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"is not UTF-8 at byte {offset + error.start}",
            field="file",
            value=path,
            mend="convert it to UTF-8",
        ) from None
