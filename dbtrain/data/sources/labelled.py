"""Table files whose rows have class ids: which rows are in which split, and what the classes are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dbtrain.data.manifest import Split
from dbtrain.data.sources.base import HELD_OUT, TEST_NAMES, holdout
from dbtrain.data.sources.tables import Tables
from dbtrain.errors import UserError

_LABEL_NAMES = ("label", "fine_label")


class Part(NamedTuple):
    """A few hundred rows of one file."""

    path: str
    first: int
    """Number of the first row in its file."""
    values: pa.Array[Any]
    """The column asked for."""
    labels: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.bool_]
    """Which rows belong to the split."""


class LabelledTables:
    """Rows with labels in two splits; without a test split, a tenth of every class is held out."""

    def __init__(self, tables: Tables, label_column: str | None, *, optional: bool):
        self._tables = tables
        self._column = self._find_label(label_column, optional)
        labels = self._labels(tables.train)
        if not labels.size:
            raise tables.error("holds no training rows", "give files with rows")
        test, test_labels = self._test_files()
        self.class_names: tuple[str, ...] = ()
        if self._column is not None:
            self.class_names = tables.class_names(self._column) or tuple(
                str(label) for label in range(int(max(labels.max(), test_labels.max(initial=0))) + 1)
            )
            for part in (labels, test_labels):
                self._check(part, self._column)
        self._held = None if test else holdout(labels, HELD_OUT)
        self._paths: dict[Split, list[str]] = {"train": tables.train, "test": test or tables.train}
        self._rows: dict[Split, int] = {"train": len(labels), "test": len(test_labels)}
        if self._held is not None:
            self._rows = {"train": int((~self._held).sum()), "test": int(self._held.sum())}

    def rows(self, split: Split) -> int:
        """Number of rows in a split."""
        return self._rows[split]

    def read(self, split: Split, column: str) -> Iterator[Part]:
        """A column and the labels, in the order of the files' names and of the rows in them."""
        seen = 0
        for path in self._paths[split]:
            first = 0
            for batch in self._tables.batches(path, [column, *([self._column] if self._column else [])]):
                rows = batch.num_rows
                chosen = np.ones(rows, dtype=np.bool_)
                if self._held is not None:
                    held = self._held[seen : seen + rows]
                    chosen = held if split == "test" else ~held
                labels = np.zeros(rows, dtype=np.int64)
                if self._column is not None:
                    labels = batch.column(self._column).cast(pa.int64()).to_numpy()
                yield Part(path, first, batch.column(column), labels, chosen)
                first, seen = first + rows, seen + rows

    def _test_files(self) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Files and labels of the first test split that has labels (the hub marks hidden ones with -1)."""
        for name in TEST_NAMES:
            if name in self._tables.groups:
                labels = self._labels(self._tables.groups[name])
                if labels.size and labels.min() >= 0:
                    return self._tables.groups[name], labels
        return [], np.empty(0, dtype=np.int64)

    def _labels(self, paths: list[str]) -> npt.NDArray[np.int64]:
        if self._column is None:
            return np.zeros(sum(map(self._tables.rows, paths)), dtype=np.int64)
        parts = [np.empty(0, dtype=np.int64)]
        for path in paths:
            for batch in self._tables.batches(path, [self._column]):
                column = batch.column(0)
                if column.null_count:
                    raise self._tables.error(f"{path} has rows without {self._column!r}", "fill or remove them")
                parts.append(column.cast(pa.int64()).to_numpy())
        return np.concatenate(parts)

    def _check(self, labels: npt.NDArray[np.int64], column: str) -> None:
        last = len(self.class_names) - 1
        wrong = labels[(labels < 0) | (labels > last)]
        if wrong.size:
            raise self._tables.error(
                f"has the class id {wrong[0]} in {column!r}, outside 0..{last}",
                "mend the labels, or the class names in the metadata",
            )

    def _find_label(self, wanted: str | None, optional: bool) -> str | None:
        names = [field.name for field in self._tables.schema if pa.types.is_integer(field.type)]
        listed = ", ".join(names) or "none"
        if wanted is not None:
            if wanted in names:
                return wanted
            raise UserError(
                "is not an integer column of the source",
                field="--label-column",
                value=wanted,
                mend=f"integer columns: {listed}",
            )
        if len(names) == 1:
            return names[0]
        for name in _LABEL_NAMES:
            if name in names:
                return name
        if optional and not names:
            return None
        raise self._tables.error(
            f"does not show which column holds the class ids; integer columns: {listed}",
            "pass --label-column",
        )
