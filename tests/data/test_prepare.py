from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from image_files import png, random_pixels, write_parquet

from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.data.manifest import Manifest
from dbtrain.data.prepare import ensure_prepared, prepare
from dbtrain.data.shards import ShardSet
from dbtrain.errors import UserError


def run_config(path: Path, source: str = "mine", **model: int) -> RunConfig:
    shape = {"image_size": 6, "channels": 3, "num_classes": 4, **model}
    network = {"patch_size": 1, "depth": 2, "width": 8, "heads": 2, "mlp_width": 8}
    return parse_config(
        {
            "name": "test",
            "model": {**network, **shape},
            "blocks": {"count": 2},
            "data": {"source": source, "path": str(path)},
            "training": {"steps": 10},
        }
    )


def left_behind(folder: Path) -> list[str]:
    """Everything but the source and the final folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("source", "shards"))


def test_mean_and_std_are_those_of_the_training_pixels(shards: Path) -> None:
    pixels = random_pixels(40) / 255
    manifest = Manifest.load(shards)
    assert np.allclose(manifest.mean, pixels.mean(axis=(0, 1, 2)), atol=1e-12)
    assert np.allclose(manifest.std, pixels.std(axis=(0, 1, 2)), atol=1e-12)


def test_a_constant_channel_can_still_be_normalised(tmp_path: Path) -> None:
    black = png(np.zeros((4, 4), dtype=np.uint8))
    write_parquet(tmp_path / "source" / "train-0.parquet", [black] * 20, [0, 1] * 10)
    assert prepare(str(tmp_path / "source"), tmp_path / "shards").std == (1.0,)


def test_the_same_source_gives_the_same_digest(parquet_source: Path, tmp_path: Path) -> None:
    a = prepare(str(parquet_source), tmp_path / "a")
    b = prepare(str(parquet_source), tmp_path / "b")
    assert a == b
    assert a.facts().sha256 == b.facts().sha256


def test_shards_stay_within_their_size(parquet_source: Path, tmp_path: Path) -> None:
    manifest = prepare(str(parquet_source), tmp_path / "shards", shard_bytes=1000)
    assert [shard.rows for shard in manifest.splits["train"].shards] == [8] * 5


def test_progress_reaches_the_end(parquet_source: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare(str(parquet_source), tmp_path / "shards", progress=lambda *args: told.append(args))
    assert ("train", 40, 40) in told
    assert told[-1] == ("test", 10, 10)


def test_prepared_data_is_not_replaced_unasked(parquet_source: Path, shards: Path) -> None:
    before = Manifest.load(shards)
    with pytest.raises(UserError, match="--overwrite"):
        prepare(str(parquet_source), shards)
    assert Manifest.load(shards) == before


def test_overwrite_replaces_the_whole_folder(parquet_source: Path, shards: Path, tmp_path: Path) -> None:
    prepare(str(parquet_source), shards, overwrite=True)
    assert sorted(path.name for path in shards.iterdir()) == [
        "manifest.json",
        "test-00000.arrow",
        "train-00000.arrow",
    ]
    assert left_behind(tmp_path) == []


def test_a_folder_of_other_files_is_never_replaced(parquet_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds no prepared data"):
        prepare(str(parquet_source), out, overwrite=True)
    assert (out / "holiday.jpg").read_bytes() == b"precious"


def test_an_empty_folder_is_as_good_as_none(parquet_source: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    prepare(str(parquet_source), tmp_path / "shards")
    assert ShardSet.open(tmp_path / "shards", "train").rows == 40


def test_a_failing_prepare_leaves_nothing(parquet_source: Path, tmp_path: Path) -> None:
    images: list[bytes | None] = [png(pixels) for pixels in random_pixels(30)]
    images[25] = images[25][:60]  # type: ignore[index]
    write_parquet(parquet_source / "train-00002.parquet", images, [0] * 30)
    with pytest.raises(UserError, match="row 25"):
        prepare(str(parquet_source), tmp_path / "shards", shard_bytes=1000)
    assert not (tmp_path / "shards").exists()
    assert left_behind(tmp_path) == []


def test_a_failing_overwrite_keeps_the_old_data(parquet_source: Path, shards: Path) -> None:
    before = Manifest.load(shards)
    (parquet_source / "train-00000-of-00002.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError):
        prepare(str(parquet_source), shards, overwrite=True)
    assert Manifest.load(shards) == before
    ShardSet.open(shards, "train").verify()


def test_an_interrupted_prepare_leaves_nothing(parquet_source: Path, tmp_path: Path) -> None:
    def interrupt(split: str, rows: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(parquet_source), tmp_path / "shards", progress=interrupt)
    assert not (tmp_path / "shards").exists()
    assert left_behind(tmp_path) == []


_KILLED = """
import sys
from pathlib import Path
from dbtrain.data.prepare import prepare
def stop(*args):
    print("writing", flush=True)
    sys.stdin.read()
prepare(sys.argv[1], Path(sys.argv[2]), shard_bytes=1000, progress=stop)
"""


def test_what_a_killed_prepare_left_is_cleared_by_the_next(parquet_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(parquet_source), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert len(left_behind(tmp_path)) == 1
        # A prepare beside a living one leaves the other's work alone.
        prepare(str(parquet_source), tmp_path / "source" / "shards")
        assert len(left_behind(tmp_path)) == 1
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    prepare(str(parquet_source), out)
    assert left_behind(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(tiny_disk: Callable[[str], Path], tmp_path: Path) -> None:
    disk = tiny_disk("size=256k")
    source = tmp_path / "source"
    images = [png(pixels) for pixels in random_pixels(200, size=30)]
    write_parquet(source / "train-0.parquet", images, [0, 1] * 100)
    with pytest.raises(UserError, match="the disk is full") as caught:
        prepare(str(source), disk / "shards", shard_bytes=100_000)
    assert caught.value.field == "--out"
    assert list(disk.iterdir()) == []


def test_read_only_disk(tiny_disk: Callable[[str], Path], parquet_source: Path) -> None:
    disk = tiny_disk("size=256k,ro")
    with pytest.raises(UserError, match="the disk is read-only"):
        prepare(str(parquet_source), disk / "shards")
    assert list(disk.iterdir()) == []


def test_data_on_a_read_only_disk_can_be_used(tiny_disk: Callable[[str], Path], parquet_source: Path) -> None:
    disk = tiny_disk("size=1m")
    prepare(str(parquet_source), disk / "shards")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ensure_prepared(run_config(disk / "shards"))
    ShardSet.open(disk / "shards", "train").verify()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_forbidden_folder(parquet_source: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(UserError, match="permission denied"):
        prepare(str(parquet_source), locked / "shards")


def test_a_file_in_the_way(parquet_source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        prepare(str(parquet_source), tmp_path / "file")
    with pytest.raises(UserError, match="--out"):
        prepare(str(parquet_source), tmp_path / "file" / "shards")


@pytest.mark.parametrize(
    ("field", "options"), [("--size", {"size": 0}), ("--channels", {"channels": 2}), ("--length", {"length": 1})]
)
def test_impossible_options(parquet_source: Path, tmp_path: Path, field: str, options: dict[str, int]) -> None:
    with pytest.raises(UserError) as caught:
        prepare(str(parquet_source), tmp_path / "shards", **options)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_ensure_prepared_finds_prepared_data(shards: Path) -> None:
    assert ensure_prepared(run_config(shards)) == Manifest.load(shards)


def test_ensure_prepared_makes_a_built_in_source(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = run_config(tmp_path / "digits", "digits", image_size=8, channels=1, num_classes=10)
    first = ensure_prepared(config)
    written = (tmp_path / "digits" / "manifest.json").stat().st_mtime_ns
    assert ensure_prepared(config) == first
    assert (tmp_path / "digits" / "manifest.json").stat().st_mtime_ns == written


def test_ensure_prepared_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"dbtrain prepare SOURCE --out {tmp_path}/nowhere") as caught:
        ensure_prepared(run_config(tmp_path / "nowhere"))
    assert caught.value.field == "data.source"


@pytest.mark.parametrize(
    ("field", "model"),
    [("image_size", {"image_size": 8}), ("channels", {"channels": 1}), ("num_classes", {"num_classes": 3})],
)
def test_data_that_does_not_fit_the_model(shards: Path, field: str, model: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"set model.{field}=") as caught:
        ensure_prepared(run_config(shards, **model))
    assert caught.value.field == f"model.{field}"


def test_other_data_in_the_place_of_a_built_in_source(shards: Path) -> None:
    with pytest.raises(UserError, match="holds data prepared from") as caught:
        ensure_prepared(run_config(shards, "digits"))
    assert caught.value.field == "data.source"


def test_two_at_once_do_not_harm_each_other(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    code = (
        "import sys; from pathlib import Path; from dbtrain.config_file import load_config\n"
        "from dbtrain.data.prepare import ensure_prepared\n"
        "sys.stdin.readline(); print(ensure_prepared(load_config(sys.argv[1])).facts().sha256)"
    )
    config = run_config(tmp_path / "digits", "digits", image_size=8, channels=1, num_classes=10)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    digests = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert digests[0] == digests[1] == f"{Manifest.load(tmp_path / 'digits').facts().sha256}\n"
