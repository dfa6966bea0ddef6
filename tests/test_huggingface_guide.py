"""docs/huggingface.md is followed to the letter, with small data sets under the names of the large ones."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN, HubServer
from PIL import Image

from dbtrain.cli.main import run

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "huggingface.md"
SHORTER = [
    "training.steps=2",
    "schedule.warmup_steps=1",
    "training.batch_size=8",
    "model.width=16",
    "model.mlp_width=16",
]
IMAGES = """---
dataset_info:
  config_name: cifar100
  features:
  - {name: img, dtype: image}
  - {name: fine_label, dtype: int64}
  - {name: coarse_label, dtype: int64}
configs:
- config_name: cifar100
  data_files:
  - {split: train, path: cifar100/train-*}
  - {split: test, path: cifar100/test-*}
---
"""
CONFIGS = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files: wikitext-103-raw-v1/*
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: train, path: wikitext-2-raw-v1/train-*}
  - {split: validation, path: wikitext-2-raw-v1/validation-*}
---
"""


def put_images(root: Path, split: str, count: int) -> None:
    images = []
    for index in range(count):
        data = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data, "PNG")
        images.append({"bytes": data.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([index % 100 for index in range(count)], pa.int64())
    table = pa.table({"img": pa.array(images, kind), "fine_label": labels, "coarse_label": labels})
    path = root / "cifar100" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture
def place(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and what the guide takes from the hub."""
    images = hub.repository("datasets", "uoft-cs/cifar100")
    put_images(images, "train", 120)
    put_images(images, "test", 20)
    (images / "README.md").write_text(IMAGES)
    text = hub.repository("datasets", "Salesforce/wikitext")
    for name in ("wikitext-103-raw-v1/train", "wikitext-2-raw-v1/train", "wikitext-2-raw-v1/validation"):
        path = text / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": ["The game takes place in many other words . \n"] * 60}), path)
    (text / "README.md").write_text(CONFIGS)
    folder = tmp_path / "place"
    folder.mkdir()
    shutil.copytree(ROOT / "configs", folder / "configs")
    Image.new("RGB", (32, 32), "red").save(folder / "photo.png")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return folder


def test_the_guide(hub: HubServer, place: Path) -> None:
    said = io.StringIO()
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        with contextlib.redirect_stdout(said):
            if language == "python":
                exec(block, {})
                continue
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                shorter = [part for text in SHORTER for part in ("--set", text)] if arguments[0] == "train" else []
                assert program == "dbtrain"
                assert run([*arguments, *shorter]) == 0, line
    assert "120 train, 20 test images of 3x32x32" in said.getvalue()
    listed = re.findall(r"exported/cifar100/(\S+)", GUIDE.read_text())
    assert set(listed) - {"tokenizer.json"} == {path.name for path in Path("exported/cifar100").iterdir()}
    pushed = hub.files("models", "me/cifar100-blocks")
    assert pushed["model.safetensors"] == Path("runs/cifar100/model/model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert "datasets:\n- uoft-cs/cifar100\n" in card
    assert "model-index:" in card
    assert "license" not in card.partition("# vit-cifar100-cpu")[0]
    assert hub.private == {"me/cifar100-blocks"}
