"""Latents: what an image encoder outside has made of images, as a column of tensors in Parquet or Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from dbtrain.data.columns import DType, ImageShape, Rows
from dbtrain.data.manifest import Split
from dbtrain.data.sources.base import SourceOptions, image_rows
from dbtrain.data.sources.labelled import LabelledTables
from dbtrain.data.sources.tables import Tables
from dbtrain.errors import UserError

_PREFERRED = "latent"


def latent_column(schema: pa.Schema) -> str | None:
    """The column of fixed-shape tensors: the one called `latent`, else the only one."""
    names = [field.name for field in schema if isinstance(field.type, pa.FixedShapeTensorType)]
    return _PREFERRED if _PREFERRED in names else names[0] if len(names) == 1 else None


class Latents:
    """The tensors of one or more table files; labels are optional."""

    kind: Literal["latent"] = "latent"

    def __init__(self, tables: Tables, column: str, options: SourceOptions):
        self.name = tables.name
        self._column = column
        self._type = cast("pa.FixedShapeTensorType[Any]", tables.schema.field(column).type)
        shape, item = tuple(self._type.shape), self._type.value_type
        order = self._type.permutation
        if len(shape) != 3 or (order is not None and list(order) != [0, 1, 2]):
            raise tables.error(f"{column!r} holds tensors of {self._type}", "store them as (channels, height, width)")
        if item not in (pa.float16(), pa.float32()):
            raise tables.error(f"{column!r} holds numbers of type {item}", "store them as float16 or float32")
        self._dtype: DType = "float16" if item == pa.float16() else "float32"
        self.columns = ImageShape(channels=shape[0], height=shape[1], width=shape[2]).columns(self._dtype)
        self._rows = LabelledTables(tables, options.label_column, optional=True)
        self.class_names = self._rows.class_names

    def rows(self, split: Split) -> int:
        """Number of latents in a split."""
        return self._rows.rows(split)

    def batches(self, split: Split) -> Iterator[Rows]:
        """All latents of a split, in the order of the files' names and of the rows in them."""
        for part in self._rows.read(split, self._column):
            if part.values.type != self._type:
                raise UserError(
                    f"has tensors of {part.values.type} in {self._column!r}, other files of {self._type}",
                    field="file",
                    value=part.path,
                    mend="store all in one shape and type",
                )
            if part.values.null_count:
                self._refuse(part.path, part.first + part.values.is_null().to_numpy(False).argmax(), "has no latent")
            latents = cast("pa.FixedShapeTensorArray[Any]", part.values).to_numpy_ndarray()
            broken = ~np.isfinite(latents).all(axis=(1, 2, 3))
            if broken.any():
                self._refuse(part.path, part.first + broken.argmax(), "holds a number that is not finite")
            yield image_rows(latents[part.chosen], part.labels[part.chosen])

    def _refuse(self, path: str, row: Any, problem: str) -> None:
        raise UserError(problem, field="latent", value=f"{path}, row {row}", mend="mend or remove it")
