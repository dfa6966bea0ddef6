"""Small images and Parquet files, made on the spot."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def random_pixels(count: int, size: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (count, size, size, channels) if channels > 1 else (count, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int],
    names: Sequence[str] | None = None,
    label_column: str = "label",
    extra: dict[str, Sequence[Any]] | None = None,
) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns: dict[str, pa.Array] = {
        "img": pa.array([{"bytes": data, "path": None} for data in images], type=kind),
        label_column: pa.array(labels, type=pa.int64()),
    }
    columns |= {name: pa.array(values) for name, values in (extra or {}).items()}
    table = pa.table(columns)
    if names is not None:
        features = {"img": {"_type": "Image"}, label_column: {"names": list(names), "_type": "ClassLabel"}}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=16)
