"""What the loader costs: a batch of CIFAR-size images, the first batch of a large set, its share of a step.

    python benchmarks/loader.py [--json] [--threads 1]

The large set is real Arrow shards with holes in place of the pixels, so that it takes hardly any disk. Beside our
loader, in this process: torch's DataLoader with two worker processes on the same images with the same crops and flips,
over arrays in memory and, where it is installed, over a Hugging Face dataset. They take turns; the ratios are medians.
The share of a step is also that of the demo's recipes, whose steps are among the shortest.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from other_loaders import PADDING, Distort, hugging_face_loader, rows_per_second, torch_loader

from dbtrain.config import RunConfig
from dbtrain.config_file import load_config, parse_config
from dbtrain.data.batches import make_transform
from dbtrain.data.columns import ImageShape
from dbtrain.data.loader import BatchLoader
from dbtrain.data.manifest import Manifest, ShardFile, SplitFiles
from dbtrain.data.order import SampleOrder
from dbtrain.data.prepare import prepare
from dbtrain.data.shard_writer import SplitWriter, write_shard
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import TrainTransform
from dbtrain.data_config import AugmentConfig, RandAugmentConfig
from dbtrain.models import family_of
from dbtrain.randomness import generator

BATCH = 128
PROCESSES = 2
"""Of torch's DataLoader."""
DEMOS = Path(__file__).parent.parent / "configs" / "demo"
CIFAR = ImageShape(channels=3, height=32, width=32)
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
CROP_FLIP = AugmentConfig(crop_padding=PADDING, flip=True)
RANDAUGMENT = CROP_FLIP.model_copy(update={"randaugment": RandAugmentConfig()})
_HOLE = 1 << 20


class SparseFile:
    """A file that leaves holes where long runs of zeros are written."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self.bytes = 0
        self.closed = False

    def write(self, data: memoryview) -> int:
        """Append bytes."""
        if len(data) >= _HOLE and not np.frombuffer(data, dtype=np.uint8).any():
            self._file.seek(len(data), os.SEEK_CUR)
        else:
            self._file.write(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self.bytes

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Give the file its full length."""
        if not self.closed:
            self.closed = True
            with self._file:
                self._file.truncate(self.bytes)


def write_manifest(folder: Path, files: SplitFiles) -> None:
    """A manifest in which the test split is the training split."""
    manifest = Manifest(
        source="benchmark",
        kind="image",
        columns=CIFAR.columns(),
        class_names=tuple(str(label) for label in range(100)),
        splits={"train": files, "test": files},
        mean=MEAN,
        std=STD,
    )
    (folder / "manifest.json").write_text(manifest.to_json())


def make_cifar(folder: Path, rows: int) -> None:
    """Noise of CIFAR's shape and size."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    writer = SplitWriter(folder, "train", CIFAR.columns(), 256_000_000, cold=False)
    pixels = generator.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8)
    writer.append({"image": pixels, "label": generator.integers(0, 100, rows)})
    files = writer.finish()
    assert files is not None
    write_manifest(folder, files)


def make_large(folder: Path, total_bytes: int) -> None:
    """Shards of about 256 MB, full of holes, until they claim `total_bytes`."""
    folder.mkdir()
    rows = 256_000_000 // (CIFAR.bytes + 8) // 64 * 64
    empty = {column.name: np.zeros((rows, *column.shape), dtype=column.numpy) for column in CIFAR.columns()}
    shards: list[ShardFile] = []
    while sum(shard.bytes for shard in shards) < total_bytes:
        name = f"train-{len(shards):05d}.arrow"
        file = SparseFile(folder / name)
        write_shard(file, CIFAR.columns(), empty)
        file.close()
        shards.append(ShardFile(file=name, rows=rows, bytes=file.bytes, sha256="0" * 64))
    write_manifest(folder, SplitFiles(rows=rows * len(shards), shards=tuple(shards)))


def loader_of(folder: Path, augment: AugmentConfig) -> BatchLoader:
    """As the trainer builds it."""
    shards = ShardSet.open(folder, "train")
    transform = TrainTransform(augment, MEAN, STD, key=0)
    return BatchLoader(shards, SampleOrder(shards.rows, seed=0, block=0), transform, BATCH)


def milliseconds(work: Callable[[int], object], repeats: int) -> float:
    """Median time of a call."""
    work(0)
    times = []
    for step in range(1, repeats + 1):
        start = time.perf_counter()
        work(step)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def resident_bytes() -> int:
    """Memory of this process that is in RAM, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def paper_config() -> RunConfig:
    """The paper's ViT for CIFAR-100: 12 layers of width 128, patch 4, three blocks."""
    return parse_config(
        {
            "name": "loader-benchmark",
            "model": {
                "image_size": 32,
                "channels": 3,
                "num_classes": 100,
                "patch_size": 4,
                "depth": 12,
                "width": 128,
                "heads": 4,
                "mlp_width": 512,
                "dropout": 0.1,
            },
            "blocks": {"count": 3},
            "training": {"steps": 1, "batch_size": BATCH},
        }
    )


def step_milliseconds(config: RunConfig, loader: BatchLoader, repeats: int) -> float:
    """A training step of the first block of `config`, without the loader."""
    family = family_of(config)
    piece = family.cut(config)[0]
    assert piece.trained is not None
    block = family.build_block(config, piece.layers, piece.trained, family.codebook(config))
    optimiser = torch.optim.AdamW(block.parameters(), fused=True)
    batch = loader.batch(0)

    def step(number: int) -> None:
        optimiser.zero_grad()
        loss = block.training_loss(batch, block.draw(config.training.batch_size, generator(number)))
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return milliseconds(step, repeats)


def demo_shares(root: Path, repeats: int) -> dict[str, float]:
    """The loader's share of a step in each of the demo's recipes, by family."""
    shares = {}
    for path in sorted(DEMOS.glob("*.yaml")):
        config = load_config(path)
        folder = root / config.data.source
        if not folder.exists():  # the texts have windows of one length
            prepare(config.data.source, folder, length=getattr(config.model, "length", None))
        shards = ShardSet.open(folder, "train")
        facts = shards.manifest.facts()
        transform = make_transform(config, facts, family_of(config).scaling(config, facts), key=0)
        order = SampleOrder(shards.rows, config.seed, block=0)
        loader = BatchLoader(shards, order, transform, config.training.batch_size)
        batch = milliseconds(loader.batch, repeats)
        shares[config.model.family] = batch / (batch + step_milliseconds(config, loader, repeats))
    return shares


def beside_others(folder: Path, repeats: int, rounds: int) -> dict[str, float | None]:
    """Rows a second of ours and of the others, which take turns, and the medians of the ratios; None: not installed."""
    shards, rows = ShardSet.open(folder, "train"), np.arange(10_000)
    images, labels = shards.gather("image", rows), shards.gather("label", rows)
    arguments = (images, labels, Distort(MEAN, STD), BATCH, PROCESSES)
    others = {"torch": torch_loader(*arguments), "hugging_face": hugging_face_loader(*arguments)}
    ours = loader_of(folder, CROP_FLIP)
    found: dict[str, float | None] = {}
    for name, loader in others.items():
        if loader is None:
            found[f"{name}_rows_per_second"] = found[f"times_{name}"] = None
            continue
        theirs, ratios = [], []
        for _ in range(rounds):
            theirs.append(rows_per_second(loader, repeats))
            ratios.append(BATCH / milliseconds(ours.batch, repeats) * 1e3 / theirs[-1])
        found[f"{name}_rows_per_second"], found[f"times_{name}"] = float(np.median(theirs)), float(np.median(ratios))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--large-bytes", type=float, default=10e9, help="size of the large set (default: 10e9)")
    parser.add_argument("--repeats", type=int, default=50, help="batches timed (default: 50)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"threads": options.threads, "batch_size": BATCH}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_large(root / "large", int(options.large_bytes))
        make_cifar(root / "cifar", 10_000)

        loader = loader_of(root / "cifar", CROP_FLIP)
        result["batch_ms"] = milliseconds(loader.batch, options.repeats)
        result["rows_per_second"] = BATCH / result["batch_ms"] * 1e3
        result["batch_with_randaugment_ms"] = milliseconds(
            loader_of(root / "cifar", RANDAUGMENT).batch, options.repeats
        )

        before, start = resident_bytes(), time.perf_counter()
        large = loader_of(root / "large", CROP_FLIP)
        large.batch(0)
        result["large_set_bytes"] = sum(path.stat().st_size for path in (root / "large").glob("*.arrow"))
        result["large_first_batch_ms"] = (time.perf_counter() - start) * 1e3
        result["large_first_batch_rss_bytes"] = resident_bytes() - before
        for number in range(1, options.repeats + 1):
            large.batch(number)
        result["large_later_batches_rss_bytes"] = resident_bytes() - before

        result |= beside_others(root / "cifar", options.repeats, rounds=3)
        result["block_step_ms"] = step_milliseconds(paper_config(), loader, max(3, options.repeats // 10))
        result["share_of_step"] = result["batch_ms"] / (result["batch_ms"] + result["block_step_ms"])
        result["demo_shares"] = demo_shares(root, options.repeats)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.threads} thread(s), batches of {BATCH} images of {CIFAR}")
    print(f"batch, crop + flip        {result['batch_ms']:8.2f} ms   {result['rows_per_second']:,.0f} rows/s")
    print(f"batch, and RandAugment    {result['batch_with_randaugment_ms']:8.2f} ms")
    print(f"step of one of 3 blocks   {result['block_step_ms']:8.1f} ms   ViT of 12 layers, width 128, patch 4")
    print(f"loader's share of a step  {100 * result['share_of_step']:8.1f} %")
    print(
        f"first batch of {result['large_set_bytes'] / 1e9:.1f} GB    {result['large_first_batch_ms']:8.1f} ms   "
        f"{result['large_first_batch_rss_bytes'] / 1e6:.1f} MB more resident; "
        f"{result['large_later_batches_rss_bytes'] / 1e6:.1f} MB after {options.repeats} more"
    )
    shares = ", ".join(f"{family} {100 * share:.1f} %" for family, share in result["demo_shares"].items())
    print(f"its share in the demo     {shares}")
    for name, title in (("torch", "torch DataLoader"), ("hugging_face", "the same over datasets")):
        rows = result[f"{name}_rows_per_second"]
        if rows is None:
            print(f"{title:<25} not installed")
            continue
        times = result[f"times_{name}"]
        print(f"{title:<25} {rows:8,.0f} rows/s in {PROCESSES} processes; ours makes {times:.1f} times that in one")


if __name__ == "__main__":
    main()
