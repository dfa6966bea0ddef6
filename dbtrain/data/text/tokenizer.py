"""What every tokenizer offers, the one of bytes, and finding the right one for a `tokenizer.json`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dbtrain.data.manifest import TOKENIZER_FILE
from dbtrain.errors import CorruptData, UserError

Ids = npt.NDArray[np.int64]

_PIECE = 1 << 20
_BYTE_FILE = b'{"type": "byte"}\n'


class Tokenizer(ABC):
    """Text <-> token ids 0..vocab_size - 1, one of which, the separator, stands for no text but ends documents."""

    kind: str
    """`byte`, or the type of a trained model, such as `bpe`."""
    vocab_size: int
    """Number of ids, the separator included."""
    separator: int
    """The id that ends a document and begins a text."""

    @property
    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; b"" for the separator and other special tokens."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The content of its file, from which `load_tokenizer` makes an equal one."""

    @abstractmethod
    def _encode(self, piece: str, field: str) -> Ids:
        """Ids of text that `_cut` has put apart; `field` is what an error message calls it."""

    def _cut(self, text: str, limit: int) -> Iterator[str]:
        """Parts of a long text whose ids can be had one after the other."""
        for first in range(0, len(text), limit):
            yield text[first : first + limit]

    def encode_pieces(self, text: str, limit: int = _PIECE, field: str = "text") -> Iterator[Ids]:
        """The ids of a text, about `limit` characters at a time, so that a long one needs little memory.

        Args:
            text: any.
            limit: characters.
            field: what an error message calls the text.

        Raises:
            UserError: the text holds half of a surrogate pair, which has no bytes, or what the tokenizer has no tokens
                for.
        """
        return (self._encode(piece, field) for piece in self._cut(_encodable(text, field), limit))

    def encode(self, text: str, field: str = "text") -> Ids:
        """Ids (N,) of a text, without a separator; special tokens' names in it are ordinary text.

        Raises:
            UserError: as `encode_pieces`.
        """
        return np.concatenate([np.empty(0, dtype=np.int64), *self.encode_pieces(text, field=field)])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        table = self.token_bytes
        return b"".join(table[index] for index in ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and the separator after them."""

    kind = "byte"
    vocab_size = 257
    separator = 256

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """A byte each."""
        return [bytes([value]) for value in range(256)] + [b""]

    def to_bytes(self) -> bytes:
        """A file that says so."""
        return _BYTE_FILE

    def _encode(self, piece: str, field: str) -> Ids:
        return np.frombuffer(piece.encode(), dtype=np.uint8).astype(np.int64)


def load_tokenizer(source: Path | bytes, field: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a file's content, of a file, or of a folder that holds a `tokenizer.json`.

    Args:
        source: content, file or folder.
        field: what an error message calls it.

    Raises:
        UserError: there is no such file, it needs a library that is not installed, or no separator can be found.
        CorruptData: it is not a tokenizer.
    """
    path = None
    if isinstance(source, Path):
        path = source / TOKENIZER_FILE if source.is_dir() else source
        try:
            source = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot be read: {error.strerror}",
                field=field,
                value=path,
                mend="give a tokenizer.json of the Hugging Face library",
            ) from None
    raw = _parse(source, field, path)
    if raw == json.loads(_BYTE_FILE):
        return ByteTokenizer()
    from dbtrain.data.text.subword import SubwordTokenizer  # the library is optional

    return SubwordTokenizer(source, raw, field, path)


def _parse(data: bytes, field: str, path: Path | None) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except ValueError as error:
        raw, reason = None, str(error)
    else:
        reason = "it has no model"
    if not isinstance(raw, dict) or not (raw.get("type") == "byte" or isinstance(raw.get("model"), dict)):
        raise CorruptData(
            f"is not a tokenizer file: {reason}",
            field=field,
            value=path,
            mend="give a tokenizer.json of the Hugging Face library",
        )
    return raw


def _encodable(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"holds half of a surrogate pair at character {error.start}", field=field, mend="give valid Unicode"
        ) from None
    return text
