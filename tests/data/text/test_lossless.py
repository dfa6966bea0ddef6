"""Tokens that spell less than the text would make bits per byte a matter of what was lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dbtrain.data.prepare import prepare
from dbtrain.data.text.tokenizer import Tokenizer as Ours
from dbtrain.data.text.tokenizer import load_tokenizer
from dbtrain.errors import UserError

SPECIAL = ["<unk>", "</s>"]
LETTERS = "To be, or not to be: that is the question.\n" * 30


def _trained(model: models.Model, pre: object, decoder: object, normalizer: object = None, *, all_bytes: bool) -> Ours:
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre, decoder
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if all_bytes else [],
        show_progress=False,
    )
    made.train_from_iterator([LETTERS], trainer)
    return load_tokenizer(made.to_str().encode())


def _byte_level(**options: object) -> Ours:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(models.BPE(), pre, decoders.ByteLevel(), **{"all_bytes": True, **options})  # type: ignore[arg-type]


def _words(unk: str | None, normalizer: object = None) -> Ours:
    """SentencePiece's way with spaces, and no bytes for letters that were not in the training text."""
    model = models.BPE() if unk is None else models.BPE(unk_token=unk)
    return _trained(model, pre_tokenizers.Metaspace(), decoders.Metaspace(), normalizer, all_bytes=False)


LOSSY = {
    "unknown letters": (lambda: _words("<unk>"), "to é be", "é"),
    "letters dropped in silence": (lambda: _words(None), "to é be", "é"),
    "bytes that are missing": (lambda: _byte_level(all_bytes=False), "to be é", "é"),
    "white space dropped": (
        lambda: _trained(
            models.BPE(),
            pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            decoders.ByteLevel(),
            all_bytes=True,
        ),
        "to be",
        " ",
    ),
}


@pytest.mark.parametrize("case", LOSSY)
def test_a_tokenizer_that_loses_text(case: str, tmp_path: Path) -> None:
    make, text, lost = LOSSY[case]
    tokenizer = make()
    with pytest.raises(UserError, match="the tokenizer's tokens do not spell it from") as caught:
        tokenizer.encode(text)
    assert f"from {lost!r}"[:-1] in str(caught.value)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer.to_bytes())
    (tmp_path / "all.txt").write_text(LETTERS + text)
    with pytest.raises(UserError, match="the tokenizer's tokens do not spell it from"):
        prepare(str(tmp_path / "all.txt"), tmp_path / "shards", length=8, tokenizer=str(path))
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("text", ["to be", " to be", "  to", "to ", "\nto", "", " "])
def test_a_space_in_front_is_no_loss(text: str) -> None:
    for tokenizer in (_words("<unk>"), _words(None)):
        assert tokenizer.decode(tokenizer.encode(text)) in (text, text.removeprefix(" "))


def test_a_text_is_what_the_normaliser_makes_of_it() -> None:
    lower = _byte_level(normalizer=normalizers.Lowercase())
    assert lower.decode(lower.encode("To BE, café")) == "to be, café"
    composed = _byte_level(normalizer=normalizers.NFC())
    assert composed.decode(composed.encode("cafe\u0301")) == "café"


@settings(deadline=None, max_examples=50)
@given(text=st.text("To be,▁ \n", max_size=40))
def test_texts_of_known_letters_pass(text: str) -> None:
    for tokenizer in (_KNOWN, _BYTES):
        tokenizer.encode(text)


_KNOWN, _BYTES = _words(None), _byte_level()
