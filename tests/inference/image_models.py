"""Small image generators, trained for a moment on real digits or on latents made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from small_runs import start_run, train_all

from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.loading import AssembledModel, load_model
from dbtrain.config import RunConfig
from dbtrain.data.prepare import prepare
from dbtrain.plan import Kind

LATENT_MEAN, LATENT_STD = (5.0, -2.0), (3.0, 0.25)


def image_model(config: RunConfig, where: Path, kind: Kind = "blocks") -> AssembledModel:
    """Train, assemble and load."""
    run = train_all(start_run(config, where, kind))
    assemble(run)
    return load_model(run.uri)


def latent_shards(folder: Path) -> Path:
    """Shards of 200 Gaussian latents (2, 4, 4) without labels."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (LATENT_MEAN, LATENT_STD))
    latents = (mean + std * np.random.default_rng(0).standard_normal((200, 2, 4, 4))).astype(np.float32)
    table = pa.table({"latent": pa.FixedShapeTensorArray.from_numpy_ndarray(latents)})
    source = folder / "latents.arrow"
    with pa.OSFile(str(source), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    prepare(str(source), folder / "shards")
    return folder / "shards"
