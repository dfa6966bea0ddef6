"""FID of a run's images with Inception weights, by torch-fidelity: the figure that papers report.

    pip install torch-fidelity torchvision
    python benchmarks/fid.py runs/dit --count 50000 [--weights weights-inception-2015-12-05-6726825d.pth]

Without --weights torch-fidelity fetches its own. The real images are the training rows, as is usual. dbtrain itself
needs neither package: `dbtrain evaluate` measures in the features of a small classifier of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

import dbtrain
from dbtrain.data.node_cache import local_shards
from dbtrain.data.shards import ShardSet
from dbtrain.inference.sample_images import ImageSampler


class Images(Dataset[Tensor]):
    """uint8 (N, C, H, W) as torch-fidelity takes images: each with three channels."""

    def __init__(self, image: Tensor):
        self._image = image.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self._image)

    def __getitem__(self, index: int) -> Tensor:
        return self._image[index]


def main() -> None:
    """Sample, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory or model folder")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--real", type=int, default=50_000, help="at most so many training images")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    sampler = dbtrain.load(arguments.run, arguments.device)
    if not isinstance(sampler, ImageSampler) or sampler.latents:
        raise SystemExit(f"{arguments.run} does not draw images")
    facts = sampler.model.plan.data
    assert facts is not None
    train = ShardSet.open(local_shards(sampler.config.data, facts.sha256), "train")
    real = torch.from_numpy(train.gather("image", np.arange(min(train.rows, arguments.real))))
    drawn = torch.from_numpy(sampler.sample(arguments.count)).permute(0, 3, 1, 2)
    found = torch_fidelity.calculate_metrics(
        input1=Images(drawn),
        input2=Images(real),
        fid=True,
        cuda=arguments.device.startswith("cuda"),
        feature_extractor_weights_path=arguments.weights,
        save_cpu_ram=True,
    )
    print(f"FID {found['frechet_inception_distance']:.2f} ({arguments.count} samples, {len(real)} training images)")


if __name__ == "__main__":
    main()
