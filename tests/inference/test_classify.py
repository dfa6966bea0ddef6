from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import dbtrain
from dbtrain.config import READOUTS
from dbtrain.errors import UserError
from dbtrain.inference.classify import PREDICT_BATCH, Classifier, Prediction
from dbtrain.inference.images import ImageLike, to_tensor
from dbtrain.run_directory import RunDirectory

Pictures = npt.NDArray[np.uint8]


def _same(a: Prediction, b: Prediction) -> bool:
    return a.class_id == b.class_id and np.allclose(a.probabilities, b.probabilities, atol=1e-5)


def test_ten_lines(trained: RunDirectory, pictures: Pictures, tmp_path: Path) -> None:
    Image.fromarray(pictures[0]).save(tmp_path / "image.png")
    model = dbtrain.load(trained.uri)
    (answer,) = model.predict([tmp_path / "image.png"])
    assert answer.label == str(answer.class_id)
    assert answer.probability == max(answer.probabilities)
    assert answer.probabilities.index(answer.probability) == answer.class_id
    assert len(answer.probabilities) == 10
    assert sum(answer.probabilities) == pytest.approx(1.0, abs=1e-5)


def test_every_way_to_give_an_image(classifier: Classifier, pictures: Pictures, tmp_path: Path) -> None:
    grey = pictures[0]
    colour = np.stack([grey] * 3, axis=-1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.dstack([colour, np.full((8, 8), 255, np.uint8)])).save(tmp_path / "alpha.png")
    Image.fromarray(np.dstack([grey, np.full((8, 8), 9, np.uint8)]), "LA").save(tmp_path / "grey-alpha.png")
    ways: list[ImageLike] = [
        grey,
        grey[:, :, None],
        np.asfortranarray(grey),
        colour,
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
        torch.from_numpy(colour).permute(2, 0, 1),
        Image.fromarray(grey),
        Image.fromarray(colour),
        *sorted(tmp_path.iterdir()),
        str(tmp_path / "grey.png"),
    ]
    answers = classifier.predict(ways)
    assert len(answers) == len(ways)
    assert all(_same(answer, answers[0]) for answer in answers)
    for way in ways:
        assert _same(classifier.predict(way)[0], answers[0])


def test_answers_do_not_depend_on_neighbours(classifier: Classifier, pictures: Pictures) -> None:
    together = classifier.predict(list(pictures))
    assert len({answer.class_id for answer in together}) > 1
    turned = classifier.predict(list(pictures[::-1]))[::-1]
    alone = [classifier.predict(picture)[0] for picture in pictures]
    for a, b, c in zip(together, turned, alone, strict=True):
        assert _same(a, b)
        assert _same(a, c)
    assert classifier.predict(list(pictures)) == together
    torch.manual_seed(5)
    assert classifier.predict(list(pictures)) == together


def test_more_images_than_fit_at_once(classifier: Classifier, pictures: Pictures) -> None:
    many = [pictures[index % 12] for index in range(PREDICT_BATCH + 5)]
    answers = classifier.predict(many)
    assert len(answers) == len(many)
    assert all(_same(answer, answers[index % 12]) for index, answer in enumerate(answers))
    assert classifier.predict([]) == []


@pytest.mark.parametrize("name", READOUTS)
def test_read_outs(classifier: Classifier, pictures: Pictures, name: str) -> None:
    images = classifier.normalise(torch.from_numpy(pictures)[:, None])
    zeros = np.zeros(12, np.int64)
    traces = [classifier.trace(images, zeros, noise) for noise in range(3 if name.endswith("_mean") else 1)]
    assert [len(trace.log_probs) for trace in traces] == [3] * len(traces)
    each = []
    for trace in traces:
        said = torch.stack(trace.log_probs)
        logs = {"first": said[0], "last": said[-1], "product": said.mean(0).log_softmax(-1)}
        each.append(logs[name.removesuffix("_mean")].exp())
    expected = torch.stack(each).mean(0)
    found = classifier.predict(list(pictures), readout=name)
    np.testing.assert_allclose([answer.probabilities for answer in found], expected.numpy(), atol=1e-5)
    if name == classifier.config.chain.readout:
        assert classifier.predict(list(pictures)) == found


@pytest.mark.parametrize("name", ["median", "", "firstly", "first_mean "])
def test_unknown_read_out(classifier: Classifier, pictures: Pictures, name: str) -> None:
    with pytest.raises(UserError, match=r"--readout = .*product_mean"):
        classifier.predict(pictures[0], readout=name)


def test_a_baseline_has_no_read_outs(baseline: RunDirectory, pictures: Pictures) -> None:
    model = dbtrain.load(baseline.uri)
    answers = model.predict(list(pictures))
    assert sum(answers[0].probabilities) == pytest.approx(1.0, abs=1e-5)
    assert _same(model.predict(pictures[3])[0], answers[3])
    with pytest.raises(UserError, match="--readout = 'first'"):
        model.predict(pictures[0], readout="first")


def test_other_sizes_are_resized_like_the_shards(pictures: Pictures) -> None:
    large = Image.fromarray(pictures[0]).resize((32, 32), Image.Resampling.NEAREST)
    assert to_tensor(large, 8, 1).shape == (1, 8, 8)
    wide = Image.new("L", (64, 32))
    wide.paste(large, (16, 0))
    # The centre square is cut out; its border pixels see a little of what was beside them.
    difference = to_tensor(wide, 8, 1).float() - to_tensor(large, 8, 1).float()
    assert difference.abs().max() < 16
    assert to_tensor(np.zeros((1, 500), np.uint8), 8, 1).shape == (1, 8, 8)


def test_grey_to_colour_and_back(pictures: Pictures) -> None:
    grey = pictures[0]
    colour = to_tensor(grey, 8, 3)
    assert colour.shape == (3, 8, 8)
    assert all(torch.equal(channel, torch.from_numpy(grey)) for channel in colour)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    assert to_tensor(red, 8, 1).unique().tolist() == [60]  # luma, ITU-R 601-2
    assert to_tensor(red, 8, 3)[:, 0, 0].tolist() == [200, 0, 0]  # channels stay in order
    assert to_tensor(torch.from_numpy(red).permute(2, 0, 1), 8, 3)[:, 0, 0].tolist() == [200, 0, 0]


def test_a_camera_held_sideways(tmp_path: Path) -> None:
    picture = np.zeros((8, 8), np.uint8)
    picture[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(to_tensor(tmp_path / "turned.png", 8, 1)[0], torch.from_numpy(np.rot90(picture, -1).copy()))


def _deep(folder: Path) -> Path:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    return folder / "deep.png"


def _cut(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    return folder / "cut.png"


def _text(folder: Path) -> Path:
    (folder / "text.png").write_text("no picture")
    return folder / "text.png"


def _empty(folder: Path) -> Path:
    (folder / "empty.png").touch()
    return folder / "empty.png"


@pytest.mark.parametrize(
    "make", [_deep, _cut, _text, _empty, lambda folder: folder, lambda folder: folder / "none.png"]
)
def test_files_that_are_no_images(classifier: Classifier, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match="image = ") as caught:
        classifier.predict([path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8)),
        np.zeros((8, 8), np.int64),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((8, 8, 5), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8), np.uint8),
        np.zeros(8, np.uint8),
        torch.zeros(1, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.bfloat16),
        torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
        Image.fromarray(np.zeros((8, 8), np.uint16)),
        Image.new("F", (8, 8)),
    ],
)
def test_arrays_that_are_no_images(classifier: Classifier, wrong: ImageLike) -> None:
    with pytest.raises(UserError, match="image = "):
        classifier.predict(wrong)
