"""What the tests of all packages share: a small run on real digits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, talk_to
from hypothesis import settings
from object_store import ObjectStore
from small_families import is_text, raw_config

# One thread a process, as in the runs: two cores carry several workers, and float sums depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray runs its workers at niceness 15, and a test beside them that computes in its own process leaves them next to
# nothing of two cores: training that takes seconds then outlasts its test's time-out.
os.environ.setdefault("RAY_worker_niceness", "0")

import dbtrain.orchestration  # noqa: F401, sets what Ray reads when some test imports it
from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.data.prepare import prepare

# Tests that are started in the background of a shell ignore Ctrl-C, and so would every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test asserts a time: machines that test are busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SmallConfig = Callable[..., RunConfig]
FamilyConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the prepared digits, shared by all tests; nobody writes there."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder)
    return folder


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared text in windows of 32 bytes, shared by all tests; nobody writes there."""
    folder = tmp_path_factory.mktemp("data") / "topics"
    prepare("topics", folder, length=32)
    return folder


@pytest.fixture
def object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An object store that S3's client reads; what lies in its `folder` are its objects."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    store = ObjectStore(folder, monkeypatch)
    yield store
    store.close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hugging Face hub of the test's own, empty; this process's client talks to it, with a cache and no token."""
    server = HubServer(tmp_path / "hub")
    talk_to(server.url, tmp_path / "home", monkeypatch)
    yield server
    server.close()


@pytest.fixture(scope="session")
def family_config(digits: Path, topics: Path) -> FamilyConfig:
    """A factory of small runs of any family; keyword arguments extend sections."""

    def make(family: str, **sections: dict[str, Any]) -> RunConfig:
        return parse_config(raw_config(family, topics if is_text(family) else digits, **sections))

    return make


@pytest.fixture(scope="session")
def small_config(digits: Path) -> SmallConfig:
    """A factory of small runs on digits; keyword arguments replace fields of a section."""

    def make(**sections: object) -> RunConfig:
        raw: dict[str, object] = {
            "name": "small",
            "seed": 7,
            "model": {
                "family": "vit",
                "image_size": 8,
                "channels": 1,
                "num_classes": 10,
                "patch_size": 4,
                "depth": 4,
                "width": 16,
                "heads": 2,
                "mlp_width": 32,
                "dropout": 0.1,
            },
            "data": {"source": "digits", "path": str(digits), "augment": {"crop_padding": 1}},
            "blocks": {"count": 3},
            "training": {"steps": 60, "batch_size": 16},
            "ema": {"half_life": 200},
            "checkpoints": {"every": 20},
            "logging": {"every": 10},
            "resources": {"cpus": 0.25, "threads": 1},
        }
        for name, value in sections.items():
            old = raw.get(name)
            raw[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        return parse_config(raw)

    return make
