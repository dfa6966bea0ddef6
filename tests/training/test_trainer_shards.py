"""Where a worker finds its shards: it knows its run directory, and fills the cache of its own machine by itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from object_store import ObjectStore
from small_runs import newest_files, start_run, train_block

from dbtrain.config import RunConfig
from dbtrain.data.prepare import ensure_prepared
from dbtrain.errors import UserError
from dbtrain.run_directory import RunDirectory
from dbtrain.training.planner import make_plan


@pytest.fixture
def remote(
    small_config: Callable[..., RunConfig], digits: Path, object_store: ObjectStore, tmp_path: Path
) -> RunDirectory:
    """A run on shards in an object store, as its driver leaves it on a machine that trains nothing."""
    shutil.copytree(digits, object_store.folder / "digits")
    data = {"path": object_store.uri("digits"), "cache": str(tmp_path / "cache")}
    config = small_config(data=data, training={"steps": 20}).located()
    plan = make_plan(config, "blocks", ensure_prepared(config).facts())
    run = RunDirectory.create_or_resume(tmp_path / "remote", config, plan)
    assert not (tmp_path / "cache").exists()
    return run


def test_a_worker_fills_the_cache_and_trains_the_same_bytes(
    remote: RunDirectory, small_config: Callable[..., RunConfig], tmp_path: Path, object_store: ObjectStore
) -> None:
    plain = start_run(small_config(training={"steps": 20}), tmp_path / "plain")
    for run in (plain, remote):
        train_block(run, 1)
    assert newest_files(remote, 1) == newest_files(plain, 1)
    assert remote.plan.data is not None
    assert (tmp_path / "cache" / remote.plan.data.sha256).is_dir()
    # The next worker of this machine needs nobody else.
    object_store.close()
    train_block(remote, 0)


def test_other_data_has_taken_its_place(remote: RunDirectory, object_store: ObjectStore) -> None:
    manifest = object_store.folder / "digits" / "manifest.json"
    text = manifest.read_text().replace('"class_names": [\n    "0"', '"class_names": [\n    "nought"')
    assert text != manifest.read_text()
    manifest.write_text(text)
    with pytest.raises(UserError, match="holds other shards than are needed"):
        train_block(remote)


def test_a_run_on_text_keeps_the_tokenizer_of_a_uri(
    family_config: Callable[..., RunConfig], topics: Path, object_store: ObjectStore, tmp_path: Path
) -> None:
    shutil.copytree(topics, object_store.folder / "topics")
    config = family_config("causal_lm")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"path": object_store.uri("topics"), "cache": str(tmp_path)})}
    )
    plan = make_plan(config, "blocks", ensure_prepared(config).facts())
    tokenizer = object_store.folder / "topics" / "tokenizer.json"
    run = RunDirectory.create_or_resume(tmp_path / "run", config, plan)
    assert run.storage.read_bytes("tokenizer.json") == tokenizer.read_bytes()
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(UserError, match=r"s3://bucket/topics/tokenizer\.json"):
        RunDirectory.create_or_resume(tmp_path / "second", config, plan)
    tokenizer.unlink()
    with pytest.raises(UserError, match=r"s3://bucket/topics/tokenizer\.json.*cannot be read"):
        RunDirectory.create_or_resume(tmp_path / "third", config, plan)
