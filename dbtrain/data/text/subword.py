"""Subword tokenizers, through the Hugging Face `tokenizers` library: trained here, or read from a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbtrain.data.text.tokenizer import Ids, Tokenizer
from dbtrain.errors import CorruptData, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

SEPARATOR = "<|end|>"
"""What the separator of a tokenizer trained here is called."""
SEPARATORS = ("</s>", "<|endoftext|>", "<|end_of_text|>", SEPARATOR, "<eos>")
"""Special tokens that end documents in tokenizers from elsewhere."""
SMALLEST_VOCAB = 257
"""All bytes and the separator."""
LARGEST_VOCAB = 1 << 20
"""Far above any in use. The library makes room for a whole vocabulary before it trains."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
# A space behind a letter or digit: no pre-tokenizer lets a token reach across its beginning.
_SEAM = re.compile(r"\w ")
# Characters that the library counts words in at a time, when it trains.
_TRAIN_PIECE = 1 << 16


class SubwordTokenizer(Tokenizer):
    """A tokenizer file of the Hugging Face library whose tokens stand for known bytes.

    These are byte-level models (GPT-2, Llama 3) and those with bytes as fall-back (Llama 2).
    """

    def __init__(self, data: bytes, raw: dict[str, Any], field: str = "tokenizer", path: Path | None = None):
        self._data = data
        self._library = _load(data, field, path)
        self.kind = str(raw["model"].get("type", "bpe")).lower()
        self._vocab = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        self._special = {index for index, token in self._library.get_added_tokens_decoder().items() if token.special}
        found = [name for name in SEPARATORS if self._vocab.get(name) in self._special]
        if not found:
            raise UserError(
                "has no special token that ends a document",
                field=field,
                value=path,
                mend=f"give one with {', '.join(SEPARATORS[:-1])} or {SEPARATORS[-1]}",
            )
        self.separator = self._vocab[found[0]]
        decoders = _types(raw.get("decoder"))
        self._byte_level = "ByteLevel" in decoders
        if not self._byte_level and not decoders & {"ByteFallback", "Metaspace"}:
            raise UserError(
                "does not show which bytes its tokens stand for",
                field=field,
                value=path,
                mend="give a byte-level tokenizer, or one with bytes as fall-back",
            )

        first = [] if self._byte_level else self._library.encode("a", add_special_tokens=False).tokens
        self._leading_space = bool(first) and first[0].startswith(_SPACE)

    def to_bytes(self) -> bytes:
        """The file as it was read or trained."""
        return self._data

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What the tokens' spellings stand for."""
        table = [b""] * self.vocab_size
        letters = _byte_letters()
        for token, index in self._vocab.items():
            if index in self._special:
                continue
            fallback = _BYTE_TOKEN.fullmatch(token)
            if self._byte_level:
                # Added tokens that are not special are spelt as they read.
                known = all(letter in letters for letter in token)
                table[index] = bytes(letters[letter] for letter in token) if known else token.encode()
            elif fallback is not None:
                table[index] = bytes([int(fallback[1], 16)])
            else:
                table[index] = token.replace(_SPACE, " ").encode()
        return table

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the space that some models put in front of every text."""
        text = super().decode(ids)
        return text.removeprefix(" ") if self._leading_space else text

    def _encode(self, piece: str, field: str) -> Ids:
        ids = self._library.encode(piece, add_special_tokens=False).ids
        self._check_spelling(piece, ids, field)
        return np.array(ids, dtype=np.int64)

    def _check_spelling(self, piece: str, ids: list[int], field: str) -> None:
        """Whether the tokens spell all of a text, as the tokenizer normalises it. Bits per byte count on it.

        Raises:
            UserError: some of it is lost, as unknown letters are, and white space with some pre-tokenizers.
        """
        normalizer = self._library.normalizer
        whole = piece if normalizer is None else normalizer.normalize_str(piece)
        expected = (whole if self._byte_level else whole.replace(_SPACE, " ")).encode()
        table = self.token_bytes
        spelt = b"".join([table[index] for index in ids])
        if spelt in (expected, b" " + expected):
            return
        pairs = zip(spelt.removeprefix(b" "), expected.removeprefix(b" "), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        at = len(expected[: same + expected.startswith(b" ")].decode(errors="ignore"))
        raise UserError(
            f"the tokenizer's tokens do not spell it from {expected.decode()[at : at + 10]!r} on",
            field=field,
            value=expected.decode()[max(0, at - 20) : at + 20],
            mend="take out what it does not know, or use a byte-level tokenizer, or one with bytes as fall-back",
        )

    def _cut(self, text: str, limit: int) -> Iterator[str]:
        """At seams; but tokenizers with bytes as fall-back may put a space before what they get, and get it whole."""
        return _cut_at_seams(text, limit) if self._byte_level else iter((text,))


def train_bpe(documents: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-pair encoding on bytes (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens.

    Every text can be encoded: the 256 bytes are tokens. A text with too few pairs gives fewer tokens than asked for.

    Raises:
        UserError: the vocabulary is too small for the bytes, or beyond all bounds, or the library is not installed.
    """
    if vocab_size > LARGEST_VOCAB:
        raise UserError(f"has to be at most {LARGEST_VOCAB}", field="--vocab-size", value=vocab_size)
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"has to be at least {SMALLEST_VOCAB}, all bytes and the separator", field="--vocab-size", value=vocab_size
        )
    library = _library()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = library(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((part for text in documents for part in _cut_at_seams(text, _TRAIN_PIECE)), trainer)
    data = model.to_str().encode()
    return SubwordTokenizer(data, json.loads(data))


def _cut_at_seams(text: str, limit: int) -> Iterator[str]:
    """Parts of a text, a little over `limit` characters each, whose ids are together those of the whole."""
    first = 0
    while len(text) - first > limit:
        seam = _SEAM.search(text, first + limit)
        if seam is None:
            break
        yield text[first : seam.start() + 1]
        first = seam.start() + 1
    yield text[first:]


def _library() -> type[Library]:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise UserError(
            "the library that reads and trains subword tokenizers is not installed",
            field="tokenizer",
            mend="pip install 'dbtrain[hf]'",
        ) from None
    return Library


def _load(data: bytes, field: str, path: Path | None) -> Library:
    library = _library()
    try:
        loaded = library.from_str(data.decode())
    except Exception as error:  # the library raises nothing more specific
        reason = " ".join(str(error).split())
        raise CorruptData(
            f"is not a tokenizer file: {reason}",
            field=field,
            value=path,
            mend="give a tokenizer.json of the Hugging Face library",
        ) from None
    # Texts are encoded whole and as they are, even where a special token is spelt out in them.
    loaded.no_truncation()
    loaded.no_padding()
    loaded.encode_special_tokens = True
    return loaded


def _types(part: Any) -> set[str]:
    """Types of a component of a tokenizer file and of all inside it."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))} | set().union(*map(_types, part.values()))


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies: itself if printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}
