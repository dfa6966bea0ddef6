"""Image Parquet as the Hugging Face hub keeps it.

An image is a struct {bytes, path}; its label an integer column whose class names stand in the schema's
`huggingface` metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import pyarrow as pa

from dbtrain.data.columns import Rows
from dbtrain.data.manifest import Split
from dbtrain.data.sources.base import SourceOptions
from dbtrain.data.sources.decode import Decoder, Encoded
from dbtrain.data.sources.labelled import LabelledTables
from dbtrain.data.sources.tables import Tables
from dbtrain.errors import UserError


def image_column(schema: pa.Schema) -> str | None:
    """The first column that holds images."""
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
    return None


class ParquetImages:
    """The images of one or more Parquet files."""

    kind: Literal["image"] = "image"

    def __init__(self, tables: Tables, column: str, options: SourceOptions):
        self.name = tables.name
        self._column = column
        self._rows = LabelledTables(tables, options.label_column, optional=False)
        self.class_names = self._rows.class_names
        self._decoder = Decoder(next(self._read("train")), options)
        self.columns = self._decoder.image.columns()

    def rows(self, split: Split) -> int:
        """Number of images in a split."""
        return self._rows.rows(split)

    def batches(self, split: Split) -> Iterator[Rows]:
        """All images of a split, in the order of the files' names and of the rows in them."""
        return self._decoder.batches(self._read(split))

    def _read(self, split: Split) -> Iterator[Encoded]:
        for part in self._rows.read(split, self._column):
            images = cast(pa.StructArray, part.values).field("bytes").to_pylist()
            for index in part.chosen.nonzero()[0].tolist():
                where = f"{part.path}, row {part.first + index}"
                data = images[index]
                if data is None:
                    raise UserError(
                        "has no bytes, only the path of a file elsewhere",
                        field="image",
                        value=where,
                        mend="store the images inside the Parquet files",
                    )
                yield Encoded(data, where, int(part.labels[index]))
