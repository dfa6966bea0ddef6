from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_models import image_model, latent_shards
from PIL import Image

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.inference.sample_files import grid, save_samples
from dbtrain.inference.sample_images import ImageSampler

SmallConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def sampler(small_config: SmallConfig, tmp_path_factory: pytest.TempPathFactory) -> ImageSampler:
    config = small_config(model={"family": "dit"}, training={"steps": 2}, chain={"steps": 2})
    return ImageSampler(image_model(config, tmp_path_factory.mktemp("runs") / "run"))


def _flat(values: list[int], side: int = 8, channels: int = 1) -> np.ndarray:
    """Images of one shade each."""
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, side, side, channels), np.uint8)


def _shades(sheet: Image.Image, step: int, first: int) -> list[list[int]]:
    """The middle pixels of all tiles, `step` apart."""
    return np.asarray(sheet)[first::step, first::step].tolist()


def test_npz_has_images_and_labels(sampler: ImageSampler, tmp_path: Path) -> None:
    images = sampler.sample(6, [3, 1])
    files = save_samples(sampler, tmp_path / "new" / "folder", images, [3, 1])
    assert [file.name for file in files] == ["samples.npz", "samples.png"]
    with np.load(files[0], allow_pickle=False) as saved:
        assert saved.files == ["arr_0", "arr_1"]
        assert np.array_equal(saved["arr_0"], images)
        assert saved["arr_1"].tolist() == [3, 1, 3, 1, 3, 1]
        assert (saved["arr_0"].dtype, saved["arr_1"].dtype) == (np.uint8, np.int64)
    with Image.open(files[1]) as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(grid(images, np.array([3, 1, 3, 1, 3, 1]))))


def test_labels_in_turn_are_saved_where_none_were_named(sampler: ImageSampler, tmp_path: Path) -> None:
    files = save_samples(sampler, tmp_path, sampler.sample(12))
    with np.load(files[0]) as saved:
        assert saved["arr_1"].tolist() == [*range(10), 0, 1]


def test_latents_make_no_picture(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config(
        model={"family": "dit", "image_size": 4, "channels": 2, "patch_size": 2, "num_classes": None},
        data={"source": "latents", "path": str(latent_shards(tmp_path)), "augment": {}},
        training={"steps": 1},
        chain={"steps": 2},
    )
    sampler = ImageSampler(image_model(config, tmp_path / "run"))
    (file,) = save_samples(sampler, tmp_path / "out", sampler.sample(3))
    with np.load(file) as saved:
        assert saved.files == ["arr_0"]
        assert (saved["arr_0"].shape, saved["arr_0"].dtype) == ((3, 2, 4, 4), np.float32)


def test_a_class_is_a_row() -> None:
    """Tiles of 8x8 pixels are enlarged 8 times, with a gap of 8."""
    images, labels = _flat([10, 20, 11, 21, 12]), np.array([1, 0, 1, 0, 1])
    sheet = grid(images, labels)
    assert sheet.size == (3 * 72 + 8, 2 * 72 + 8)
    assert _shades(sheet, 72, 40) == [[20, 21, 255], [10, 11, 12]]
    assert np.asarray(sheet)[:8].min() == 255


def test_without_classes_a_square() -> None:
    for labels in (None, np.arange(5), np.zeros(5, np.int64)):
        assert _shades(grid(_flat([1, 2, 3, 4, 5]), labels), 72, 40) == [[1, 2, 3], [4, 5, 255]]


def test_rows_of_so_many_keep_the_order() -> None:
    sheet = grid(_flat([1, 2, 3, 4, 5]), np.array([1, 0, 1, 0, 1]), columns=4)
    assert _shades(sheet, 72, 40) == [[1, 2, 3, 4], [5, 255, 255, 255]]


def test_colour_and_size() -> None:
    images = _flat([9], side=100, channels=3)
    images[..., 1] = 77
    sheet = grid(images)
    assert (sheet.mode, sheet.size) == ("RGB", (104, 104))
    assert sheet.getpixel((50, 50)) == (9, 77, 9)


def test_many_images_make_a_sheet_of_bounded_size() -> None:
    sheet = grid(_flat([7] * 5000), np.arange(5000) % 10)
    assert sheet.size[0] * sheet.size[1] < 300 * 72 * 72


def test_files_that_cannot_be_written_leave_the_old_ones(sampler: ImageSampler, tmp_path: Path) -> None:
    save_samples(sampler, tmp_path, sampler.sample(1, [3]), [3])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # The disk fills up after some bytes.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"--out = .*cannot be written to: File too large"):
            save_samples(sampler, tmp_path, sampler.sample(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_that_cannot_be(sampler: ImageSampler, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--out = .*file.*cannot be written to"):
        save_samples(sampler, tmp_path / "file" / "folder", sampler.sample(1))
