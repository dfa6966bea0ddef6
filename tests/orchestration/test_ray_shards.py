"""Workers of a cluster whose driver copies no shards: the first one on the machine does, for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from object_store import ObjectStore

from dbtrain.config import RunConfig
from dbtrain.orchestration.ray_cluster import connect
from dbtrain.orchestration.run import train_run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_share_the_copy_that_one_of_them_makes(
    make_config: Callable[..., RunConfig],
    digest_of: Callable[[Path], str],
    digits: Path,
    object_store: ObjectStore,
    tmp_path: Path,
) -> None:
    assert train_run(make_config(), tmp_path / "plain").ok
    shutil.copytree(digits, object_store.folder / "digits")
    data = {"path": object_store.uri("digits"), "cache": str(tmp_path / "cache")}
    cluster = connect()
    try:
        address = ray.get_runtime_context().gcs_address
        result = train_run(make_config(data=data), tmp_path / "run", backend="ray", address=address)
    finally:
        cluster.close()
    assert result.ok, result
    shards = list(digits.glob("*.arrow"))
    assert {key: size for key, size in object_store.sent.items() if key.endswith(".arrow")} == {
        f"digits/{shard.name}": shard.stat().st_size for shard in shards
    }
    assert digest_of(tmp_path / "run") == digest_of(tmp_path / "plain")
