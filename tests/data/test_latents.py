from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.data.moments import FloatMoments
from dbtrain.data.prepare import prepare
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import LatentTransform
from dbtrain.errors import UserError

SHAPE = (4, 3, 3)


def latents(count: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 0.5, (count, *SHAPE)).astype(dtype)


def table(values: np.ndarray, labels: list[int] | None = None, column: str = "latent", **extra: pa.Array) -> pa.Table:
    columns = {column: pa.FixedShapeTensorArray.from_numpy_ndarray(values), **extra}
    return pa.table(columns | ({} if labels is None else {"label": pa.array(labels)}))


def write_parquet(path: Path, made: pa.Table) -> None:
    pq.write_table(made, path)


def write_arrow(path: Path, made: pa.Table) -> None:
    with pa.ipc.new_file(path.with_suffix(".arrow"), made.schema) as writer:
        writer.write_table(made, max_chunksize=7)


def write_stream(path: Path, made: pa.Table) -> None:
    with pa.ipc.new_stream(path.with_suffix(".feather"), made.schema) as writer:
        writer.write_table(made)


def failure(tmp_path: Path, **options: str) -> UserError:
    with pytest.raises(UserError) as caught:
        prepare(str(tmp_path / "source"), tmp_path / "shards", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "shards").exists()
    return caught.value


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_stream], ids=lambda write: write.__name__)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_goes_in_comes_out(
    source: Path, tmp_path: Path, dtype: str, write: Callable[[Path, pa.Table], None]
) -> None:
    train, test = latents(600, dtype), latents(20, dtype, seed=1)
    write(source / "train.parquet", table(train, [row % 3 for row in range(600)]))
    write(source / "test.parquet", table(test, [row % 3 for row in range(20)]))
    manifest = prepare(str(source), tmp_path / "shards", shard_bytes=10_000)
    data = ShardSet.open(tmp_path / "shards", "train")
    data.verify()
    assert (manifest.kind, manifest.facts().shape, manifest.class_names) == ("latent", SHAPE, ("0", "1", "2"))
    found = data.gather("image", np.arange(600))
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found, train)
    assert data.gather("label", np.arange(600)).tolist() == [row % 3 for row in range(600)]
    wide = train.astype(np.float64)
    assert np.allclose(manifest.mean, wide.mean(axis=(0, 2, 3)), rtol=1e-13)
    assert np.allclose(manifest.std, wide.std(axis=(0, 2, 3)), rtol=1e-12)
    scaled = LatentTransform(manifest.mean, manifest.std)({"image": torch.from_numpy(found)})["image"]
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    assert np.array_equal(found, train)  # scaling has left its input alone


def test_a_tenth_is_held_out_and_left_out_of_the_moments(source: Path, tmp_path: Path) -> None:
    values = latents(50)
    write_parquet(source / "all.parquet", table(values, [row % 5 for row in range(50)]))
    manifest = prepare(str(source), tmp_path / "shards")
    train, test = (ShardSet.open(tmp_path / "shards", split) for split in ("train", "test"))
    assert sorted(test.gather("label", np.arange(5)).tolist()) == [0, 1, 2, 3, 4]
    kept = train.gather("image", np.arange(45))
    both = np.concatenate([kept, test.gather("image", np.arange(5))])
    assert {image.tobytes() for image in both} == {image.tobytes() for image in values}
    assert np.allclose(manifest.mean, kept.astype(np.float64).mean(axis=(0, 2, 3)), rtol=1e-13)


def test_labels_are_optional(source: Path, tmp_path: Path) -> None:
    write_parquet(source / "all.parquet", table(latents(20)))
    manifest = prepare(str(source), tmp_path / "shards")
    data = ShardSet.open(tmp_path / "shards", "train")
    data.verify()
    assert manifest.class_names == ()
    assert data.gather("label", np.arange(18)).tolist() == [0] * 18


def test_which_columns(source: Path, tmp_path: Path) -> None:
    other = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((20, 2), dtype=np.float32))
    fine, coarse = pa.array(range(20)), pa.array([0, 1] * 10)
    made = table(latents(20), vector=other, fine=fine, coarse=coarse)
    names = json.dumps({"info": {"features": {"coarse": {"names": ["cat", "dog"]}}}})
    write_parquet(source / "all.parquet", made.replace_schema_metadata({"huggingface": names}))
    assert "pass --label-column" in str(failure(tmp_path))
    assert prepare(str(source), tmp_path / "named", label_column="coarse").class_names == ("cat", "dog")
    write_parquet(source / "all.parquet", table(latents(20), column="a", b=other))
    assert "its columns are a, b" in str(failure(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(source: Path, tmp_path: Path, value: float) -> None:
    values = latents(600)
    values[555, 2, 1, 0] = value
    write_parquet(source / "train.parquet", table(values))
    error = failure(tmp_path)
    assert "not finite" in str(error)
    assert str(error.value).endswith("train.parquet, row 555")


def test_a_missing_latent(source: Path, tmp_path: Path) -> None:
    kind = pa.fixed_shape_tensor(pa.float32(), SHAPE)
    stored = pa.array([latents(1).ravel().tolist(), None] * 10, kind.storage_type)
    write_parquet(source / "train.parquet", pa.table({"latent": pa.ExtensionArray.from_storage(kind, stored)}))
    error = failure(tmp_path)
    assert "has no latent" in str(error)
    assert str(error.value).endswith("row 1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((5, *SHAPE)), "float16 or float32"),
        (np.zeros((5, 4, 9), dtype=np.float32), "(channels, height, width)"),
    ],
)
def test_tensors_of_another_kind(source: Path, tmp_path: Path, values: np.ndarray, message: str) -> None:
    write_parquet(source / "train.parquet", table(values))
    assert message in str(failure(tmp_path))


def test_files_of_different_shapes(source: Path, tmp_path: Path) -> None:
    write_parquet(source / "train-0.parquet", table(latents(5)))
    write_parquet(source / "train-1.parquet", table(np.zeros((5, 4, 2, 2), dtype=np.float32)))
    error = failure(tmp_path)
    assert "store all in one shape" in str(error)
    assert str(error.value).endswith("train-1.parquet")


def test_damaged_arrow(source: Path, tmp_path: Path) -> None:
    write_arrow(source / "train.parquet", table(latents(50)))
    path = source / "train.arrow"
    good = path.read_bytes()
    for damaged in (b"ARROW1", good[:-100], b"x" * len(good)):
        path.write_bytes(damaged)
        assert "is not readable as Arrow" in str(failure(tmp_path))


def test_options_of_images_do_not_apply(source: Path, tmp_path: Path) -> None:
    write_parquet(source / "all.parquet", table(latents(20)))
    with pytest.raises(UserError, match="does not apply to latents") as caught:
        prepare(str(source), tmp_path / "shards", size=8)
    assert caught.value.field == "--size"


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any),
    offset=st.sampled_from([0.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_moments_do_not_depend_on_the_batches(counts: list[int], offset: float, seed: int) -> None:
    values = np.random.default_rng(seed).normal(offset, 1.0, (sum(counts), 2, 3, 3))
    moments = FloatMoments(2)
    for part in np.split(values, np.cumsum(counts)[:-1]):
        moments.add(part)
    mean, std = moments.result()
    assert np.allclose(mean, values.mean(axis=(0, 2, 3)), rtol=1e-12)
    assert np.allclose(std, values.std(axis=(0, 2, 3)), rtol=1e-9)
