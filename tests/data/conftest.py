"""Small image sources and shard folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from image_files import png, random_pixels, write_parquet

from dbtrain.data.prepare import prepare


@pytest.fixture
def parquet_source(tmp_path: Path) -> Path:
    """40 training and 10 test images of 6 x 6 colour pixels in 4 named classes, in three files."""
    root = tmp_path / "source"
    names = ["ant", "bee", "cat", "dog"]
    train, test = random_pixels(40), random_pixels(10, seed=1)
    for part in range(2):
        rows = range(part * 20, part * 20 + 20)
        path = root / f"train-{part:05d}-of-00002.parquet"
        write_parquet(path, [png(train[row]) for row in rows], [row % 4 for row in rows], names)
    labels = [row % 4 for row in range(10)]
    write_parquet(root / "test-00000-of-00001.parquet", [png(image) for image in test], labels, names)
    return root


@pytest.fixture
def shards(parquet_source: Path, tmp_path: Path) -> Path:
    """That source prepared into five training shards and two test shards."""
    out = tmp_path / "shards"
    prepare(str(parquet_source), out, shard_bytes=(3 * 6 * 6 + 8) * 9)
    return out


@pytest.fixture
def class_folders(tmp_path: Path) -> Callable[..., Path]:
    def make(layout: dict[str, int], size: int = 6, channels: int = 3) -> Path:
        root = tmp_path / "folders"
        for number, (name, count) in enumerate(layout.items()):
            (root / name).mkdir(parents=True)
            for index, pixels in enumerate(random_pixels(count, size, channels, seed=number)):
                (root / name / f"{index:03d}.png").write_bytes(png(pixels))
        return root

    return make
