"""`chain.bridge: sample`: what is drawn is of (seed, position, noise number, step) alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from text_models import small_language_model

from dbtrain.assembly.loading import AssembledModel
from dbtrain.inference.classify import Classifier
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.text_sessions import open_session


def _sampling(model: AssembledModel) -> AssembledModel:
    chain = model.config.chain.model_copy(update={"bridge": "sample"})
    return replace(model, config=model.config.model_copy(update={"chain": chain}))


@pytest.fixture(scope="module")
def language_model(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> AssembledModel:
    return _sampling(small_language_model(topics, tmp_path_factory.mktemp("runs") / "blocks"))


def test_images(classifier: Classifier, pictures: npt.NDArray[np.uint8]) -> None:
    sampling = Classifier(_sampling(classifier.model))
    images = sampling.normalise(torch.from_numpy(pictures)[:, None])
    positions = np.arange(len(images))
    said = sampling.trace(images, positions, 0).log_probs
    softmax = classifier.trace(images, positions, 0).log_probs
    assert torch.equal(said[0], softmax[0])
    assert not torch.allclose(said[1], softmax[1], atol=1e-3)
    assert torch.allclose(sampling.trace(images[5:7], positions[5:7], 0).log_probs[-1], said[-1][5:7], atol=1e-5)
    numbers = [sampling.fresh(positions, noise, step) for noise in range(2) for step in (1, 2)]
    numbers += [sampling.fresh(positions + 100, 0, 1)]
    assert len(torch.stack(numbers).unique()) == sum(each.numel() for each in numbers)


@torch.inference_mode()
def test_texts(language_model: AssembledModel) -> None:
    """A session says of a text the same alone and among others, and draws anew at the next token."""
    tokens = torch.randint(256, (3, 6), generator=torch.Generator().manual_seed(0))
    keys, lengths = [11, 12, 13], torch.tensor([6, 2, 4])
    among = open_session(language_model, keys, 4, "product_mean")
    among.read(tokens, lengths)
    said = among.probabilities(0)
    alone = open_session(language_model, keys[2:], 4, "product_mean")
    alone.read(tokens[2:, :4], lengths[2:])
    torch.testing.assert_close(alone.probabilities(0)[0], said[2], atol=1e-5, rtol=0)
    assert not torch.equal(among.probabilities(1), said)


@torch.inference_mode()
def test_known_rows(language_model: AssembledModel) -> None:
    generator = TextGenerator(language_model)
    tokens = torch.randint(256, (3, generator.length), generator=torch.Generator().manual_seed(0))
    rows = np.array([4, 9, 2])
    whole = generator.trace(generator.contexts(tokens), rows, 1).log_probs[-1].view(3, generator.length, -1)
    single = generator.trace(generator.contexts(tokens[1:2]), rows[1:2], 1).log_probs[-1]
    torch.testing.assert_close(single, whole[1], atol=1e-4, rtol=0)
