from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import png, random_pixels, write_parquet
from PIL import Image

from dbtrain.data.manifest import Manifest
from dbtrain.data.prepare import prepare
from dbtrain.data.shards import ShardSet
from dbtrain.data.sources.base import holdout
from dbtrain.errors import UserError


def content(folder: Path, split: str) -> tuple[np.ndarray, list[int]]:
    data = ShardSet.open(folder, split)  # type: ignore[arg-type]
    rows = np.arange(data.rows)
    return data.gather("image", rows), data.gather("label", rows).tolist()


def failure(source: Path | str, tmp_path: Path, **options: object) -> UserError:
    out = tmp_path / "shards"
    with pytest.raises(UserError) as caught:
        prepare(str(source), out, **options)  # type: ignore[arg-type]
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return caught.value


# digits


def test_digits_are_all_there_and_split_by_class(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    manifest = prepare("digits", tmp_path / "shards")
    train, train_labels = content(tmp_path / "shards", "train")
    test, test_labels = content(tmp_path / "shards", "test")
    original = datasets.load_digits()
    assert len(train) + len(test) == 1797
    assert sorted(train_labels + test_labels) == sorted(original.target.tolist())
    assert train.min() == 0
    assert train.max() == 255
    share = np.bincount(test_labels) / np.bincount(original.target)
    assert np.abs(share - 0.2).max() < 0.01
    scaled = {np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in original.images}
    assert {image.tobytes() for image in np.concatenate([train, test])} == scaled
    assert manifest.class_names == tuple("0123456789")


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install 'dbtrain[demo]'" in str(failure("digits", tmp_path))


def test_holdout_is_stratified_and_fixed() -> None:
    labels = np.repeat(np.arange(4), [1, 2, 10, 1000])
    chosen = holdout(labels, 0.1)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [0, 1, 1, 100]
    assert np.array_equal(chosen, holdout(labels, 0.1))


# Parquet


def test_parquet_keeps_rows_order_and_names(shards: Path) -> None:
    images, labels = content(shards, "test")
    assert np.array_equal(images, random_pixels(10, seed=1).transpose(0, 3, 1, 2))
    assert labels == [row % 4 for row in range(10)]
    assert Manifest.load(shards).class_names == ("ant", "bee", "cat", "dog")


def test_parquet_by_uri(parquet_source: Path, shards: Path, tmp_path: Path) -> None:
    manifest = prepare(f"file://{parquet_source}", tmp_path / "by-uri")
    assert manifest.source == f"file://{parquet_source}"
    assert content(tmp_path / "by-uri", "train")[1] == content(shards, "train")[1]


def test_parquet_path_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / "my pictures #1 100%"
    write_parquet(folder / "train.parquet", [png(image) for image in random_pixels(20)], [0, 1] * 10)
    assert prepare(str(folder), tmp_path / "shards").class_names == ("0", "1")


def test_single_file_holds_a_tenth_out(tmp_path: Path) -> None:
    pixels = random_pixels(50)
    write_parquet(tmp_path / "all.parquet", [png(image) for image in pixels], [row % 5 for row in range(50)])
    manifest = prepare(str(tmp_path / "all.parquet"), tmp_path / "shards")
    assert manifest.class_names == ("0", "1", "2", "3", "4")
    train, _ = content(tmp_path / "shards", "train")
    test, test_labels = content(tmp_path / "shards", "test")
    assert sorted(test_labels) == [0, 1, 2, 3, 4]
    assert len(train) == 45
    both = {image.tobytes() for image in (*train, *test)}
    assert both == {image.tobytes() for image in pixels.transpose(0, 3, 1, 2)}


def test_split_folders(tmp_path: Path) -> None:
    root = tmp_path / "source"
    for split, count in (("train", 8), ("test", 4)):
        write_parquet(
            root / split / "0000.parquet",
            [png(image) for image in random_pixels(count)],
            [row % 2 for row in range(count)],
        )
    manifest = prepare(str(root), tmp_path / "shards")
    assert (manifest.splits["train"].rows, manifest.splits["test"].rows) == (8, 4)


@pytest.mark.parametrize("test_label", [0, -1])
def test_validation_stands_in_for_a_test_split_without_labels(tmp_path: Path, test_label: int) -> None:
    root = tmp_path / "source"
    for split, count, label in (("train", 8, 0), ("validation", 4, 0), ("test", 3, test_label)):
        images = [png(image) for image in random_pixels(count)]
        write_parquet(root / f"{split}-0.parquet", images, [label] * count, ["a", "b"])
    manifest = prepare(str(root), tmp_path / "shards")
    assert manifest.splits["test"].rows == (3 if test_label == 0 else 4)


def test_which_label_column(tmp_path: Path) -> None:
    images = [png(image) for image in random_pixels(20)]
    fine, coarse = [row % 5 for row in range(20)], [row % 2 for row in range(20)]
    path = tmp_path / "train.parquet"
    write_parquet(path, images, fine, label_column="fine_label", extra={"coarse_label": coarse})
    assert len(prepare(str(path), tmp_path / "fine").class_names) == 5
    coarse_manifest = prepare(str(path), tmp_path / "coarse", label_column="coarse_label")
    assert len(coarse_manifest.class_names) == 2
    error = failure(path, tmp_path, label_column="colour")
    assert error.field == "--label-column"
    assert "fine_label, coarse_label" in str(error)


def test_label_columns_that_cannot_be_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    images = [png(image) for image in random_pixels(4)]
    write_parquet(path, images, [0, 1] * 2, label_column="a", extra={"b": [1, 0] * 2})
    assert "pass --label-column" in str(failure(path, tmp_path))


@pytest.mark.parametrize("label", [-1, 4])
def test_class_id_out_of_range(parquet_source: Path, tmp_path: Path, label: int) -> None:
    images = [png(image) for image in random_pixels(3)]
    write_parquet(parquet_source / "train-00002.parquet", images, [0, label, 1])
    assert f"class id {label} in 'label', outside 0..3" in str(failure(parquet_source, tmp_path))


def test_corrupt_png_in_parquet(parquet_source: Path, tmp_path: Path) -> None:
    good = png(random_pixels(1)[0])
    middle = bytearray(good)
    middle[50] ^= 255
    for damaged in (b"", b"not an image", good[:70], bytes(middle)):
        write_parquet(parquet_source / "train-00002.parquet", [good, damaged], [0, 1])
        error = failure(parquet_source, tmp_path)
        assert "is a corrupt image" in str(error)
        assert "train-00002.parquet, row 1" in str(error)


def test_image_without_bytes(parquet_source: Path, tmp_path: Path) -> None:
    write_parquet(parquet_source / "train-00002.parquet", [None], [0])
    assert "has no bytes" in str(failure(parquet_source, tmp_path))


def test_corrupt_parquet(parquet_source: Path, tmp_path: Path) -> None:
    path = parquet_source / "train-00001-of-00002.parquet"
    good = path.read_bytes()
    for damaged in (b"PAR1", good[:-100], b"x" * len(good), good[:200] + b"\xff" * 400 + good[600:]):
        path.write_bytes(damaged)
        message = str(failure(parquet_source, tmp_path))
        assert "is not readable as Parquet" in message or "corrupt" in message
        assert "train-00001" in message


def test_parquet_without_images(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"size": [1.5], "label": [0]}), tmp_path / "train.parquet")
    assert "no column of images" in str(failure(tmp_path / "train.parquet", tmp_path))


def test_parquet_without_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [], [])
    assert "holds no training rows" in str(failure(tmp_path / "train.parquet", tmp_path))


def test_only_test_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "source" / "test-0.parquet", [png(random_pixels(1)[0])], [0])
    assert "no training files" in str(failure(tmp_path / "source", tmp_path))


@pytest.mark.parametrize(
    "source", ["nowhere", "nowhere/train.parquet", "file:///nowhere", "gopher://host/x", "x" * 300]
)
def test_missing_source(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = failure(source, tmp_path)
    assert error.field == "SOURCE"
    assert error.value == source


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    for name, message in (("a.parquet", "is not readable as Parquet"), ("a.doc", "is neither text (.txt, .md)")):
        (tmp_path / name).write_text("hello")
        assert message in str(failure(tmp_path / name, tmp_path))
    (tmp_path / "a.doc").write_bytes(b"PAR1 and no more")
    assert "is not readable as Parquet" in str(failure(tmp_path / "a.doc", tmp_path))


# Folders of class folders


def test_class_folders_hold_a_tenth_out(class_folders: Callable[..., Path], tmp_path: Path) -> None:
    root = class_folders({"zebra": 20, "ant": 10})
    (root / "README.txt").write_text("not a class")
    manifest = prepare(str(root), tmp_path / "shards")
    assert manifest.class_names == ("ant", "zebra")
    assert content(tmp_path / "shards", "train")[1] == [0] * 9 + [1] * 18
    assert content(tmp_path / "shards", "test")[1] == [0] + [1] * 2


def test_class_folders_may_be_links(class_folders: Callable[..., Path], tmp_path: Path) -> None:
    root = class_folders({"elsewhere/ant": 10, "elsewhere/bee": 10})
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("ant", "bee"):
        (linked / name).symlink_to(root / "elsewhere" / name)
    (linked / "ant" / "loop").symlink_to(linked)
    (linked / "README.txt").write_text("not a text to learn")
    assert prepare(str(linked), tmp_path / "shards").class_names == ("ant", "bee")


def test_class_folders_with_splits(class_folders: Callable[..., Path], tmp_path: Path) -> None:
    root = class_folders({"train/a": 4, "train/b": 3, "test/b": 2})
    prepare(str(root), tmp_path / "shards")
    assert content(tmp_path / "shards", "train")[1] == [0] * 4 + [1] * 3
    images, labels = content(tmp_path / "shards", "test")
    assert labels == [1, 1]
    assert np.array_equal(images, random_pixels(2, seed=2).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "holds no class folders"),
        ({"a": 2, "b": 0}, "the class folder holds no images"),
        ({"train/a": 2}, "without the other split"),
        ({"train/a": 2, "test/b": 2}, "has the class 'b'"),
        ({"a": 1, "b": 1}, "no images for the split 'test'"),
    ],
)
def test_folders_that_lack_something(
    class_folders: Callable[..., Path], tmp_path: Path, layout: dict[str, int], message: str
) -> None:
    (tmp_path / "folders").mkdir()
    assert message in str(failure(class_folders(layout), tmp_path))


def test_corrupt_png_in_a_folder(class_folders: Callable[..., Path], tmp_path: Path) -> None:
    root = class_folders({"a": 10, "b": 10})
    path = root / "b" / "004.png"
    path.write_bytes(path.read_bytes()[:80])
    error = failure(root, tmp_path)
    assert "is a corrupt image" in str(error)
    assert str(path) in str(error)


# Shapes


def test_differing_sizes_need_size(class_folders: Callable[..., Path], tmp_path: Path) -> None:
    root = class_folders({"a": 10, "b": 10})
    (root / "b" / "000.png").write_bytes(png(random_pixels(1, 9)[0]))
    assert "pass --size" in str(failure(root, tmp_path))
    manifest = prepare(str(root), tmp_path / "shards", size=5)
    assert (manifest.image.height, manifest.image.width) == (5, 5)


def test_images_that_are_not_square_need_size(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 200
    write_parquet(tmp_path / "train.parquet", [png(wide)] * 20, [0, 1] * 10)
    assert "is 12 x 4 pixels, not square" in str(failure(tmp_path / "train.parquet", tmp_path))
    prepare(str(tmp_path / "train.parquet"), tmp_path / "shards", size=4)
    images, _ = content(tmp_path / "shards", "train")
    assert (images == 200).all()


@pytest.mark.parametrize(("channels", "expected"), [(None, 3), (3, 3), (1, 1)])
def test_grey_and_colour(tmp_path: Path, channels: int | None, expected: int) -> None:
    colour, grey = random_pixels(10), random_pixels(10, channels=1)
    images = [png(image) for pair in zip(colour, grey, strict=True) for image in pair]
    write_parquet(tmp_path / "train.parquet", images, [0] * 10 + [1] * 10)
    manifest = prepare(str(tmp_path / "train.parquet"), tmp_path / "shards", channels=channels)
    assert manifest.image.channels == expected


def test_colour_is_not_thrown_away_unasked(tmp_path: Path) -> None:
    images = [png(random_pixels(1, channels=1)[0]), png(random_pixels(1)[0])] * 10
    write_parquet(tmp_path / "train.parquet", images, [0, 1] * 10)
    assert "pass --channels 3" in str(failure(tmp_path / "train.parquet", tmp_path))
    assert prepare(str(tmp_path / "train.parquet"), tmp_path / "shards", channels=3).image.channels == 3


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "LA", "1"])
def test_other_pixel_formats(tmp_path: Path, mode: str) -> None:
    out = io.BytesIO()
    Image.fromarray(random_pixels(1)[0]).convert(mode).save(out, "TIFF")
    write_parquet(tmp_path / "train.parquet", [out.getvalue()] * 20, [0, 1] * 10)
    manifest = prepare(str(tmp_path / "train.parquet"), tmp_path / "shards")
    assert manifest.image.channels == (1 if mode in ("LA", "1") else 3)


def test_sixteen_bit_pixels_are_refused(tmp_path: Path) -> None:
    deep = png(np.full((4, 4), 40_000, dtype=np.uint16))
    write_parquet(tmp_path / "train.parquet", [deep] * 20, [0, 1] * 10)
    assert "more than 8 bits" in str(failure(tmp_path / "train.parquet", tmp_path))
