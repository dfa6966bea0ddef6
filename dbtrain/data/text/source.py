"""Text as a source of rows: documents in two splits, a tokenizer, and the windows that come of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from dbtrain.data.columns import Rows, token_column
from dbtrain.data.manifest import SPLITS, Split, TextFacts, TextSplit
from dbtrain.data.sources.base import HELD_OUT, SourceOptions, holdout
from dbtrain.data.text.documents import Documents
from dbtrain.data.text.packing import Packer
from dbtrain.data.text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from dbtrain.errors import UserError

DEFAULT_LENGTH = 256
DEFAULT_VOCAB = 4096
LONGEST = 1 << 24
"""Tokens in a window at most: far above what attention over all of it allows."""


class SplitDocuments:
    """Documents for training and testing; without a split of their own, a tenth of the documents is held out.

    Which ones is decided by a fixed key. Of a single document, the last tenth is held out.
    """

    def __init__(self, train: Documents, test: Documents | None):
        self._train = train
        self._test = test
        count = 0 if test is not None else len(train)
        self._held = holdout(np.zeros(count, dtype=np.int64), HELD_OUT)

    def documents(self, split: Split) -> Iterator[str]:
        """All documents of a split, in order."""
        if self._test is not None:
            yield from self._train if split == "train" else self._test
        elif len(self._held) == 1:
            for text in self._train:
                end = len(text) * 9 // 10
                yield text[:end] if split == "train" else text[end:]
        else:
            for text, held in zip(self._train, self._held, strict=True):
                if bool(held) == (split == "test"):
                    yield text


class PackedText:
    """Windows of tokens, with documents one after the other and a separator behind each."""

    kind: Literal["text"] = "text"
    class_names = ()

    def __init__(self, name: str, documents: SplitDocuments, options: SourceOptions):
        if options.length is not None and options.length > LONGEST:
            raise UserError(f"has to be at most {LONGEST}", field="--length", value=options.length)
        self.name = name
        self.tokenizer = _tokenizer(documents, options)
        self.length = options.length if options.length is not None else DEFAULT_LENGTH
        self.columns = (token_column(self.length, self.tokenizer.vocab_size),)
        self._documents = documents
        self._packed: dict[Split, TextSplit] = {}

    def rows(self, split: Split) -> None:
        """Unknown before all of the text is encoded."""
        return

    def batches(self, split: Split) -> Iterator[Rows]:
        """All windows of a split.

        Raises:
            UserError: its text does not fill a single one.
        """
        packer = Packer(self.length, self.tokenizer.separator, self.columns[0].numpy)
        encoded = (self.tokenizer.encode_pieces(text) for text in self._documents.documents(split))
        for rows in packer.rows(encoded):
            yield {"tokens": rows}
        if packer.tokens < self.length:
            raise UserError(
                f"the text for {split}ing has {packer.tokens} tokens and fills no window",
                field="--length",
                value=self.length,
                mend=f"pass --length {packer.tokens} or less, or give more text" if packer.tokens > 1 else "give text",
            )
        self._packed[split] = TextSplit(documents=packer.documents, tokens=packer.tokens, dropped=packer.dropped)

    def facts(self) -> TextFacts:
        """What the manifest says, once both splits have been gone through."""
        assert set(self._packed) == set(SPLITS)
        return TextFacts(
            length=self.length,
            vocab_size=self.tokenizer.vocab_size,
            separator=self.tokenizer.separator,
            tokenizer=self.tokenizer.kind,
            tokenizer_sha256=hashlib.sha256(self.tokenizer.to_bytes()).hexdigest(),
            splits=self._packed,
        )


def _tokenizer(documents: SplitDocuments, options: SourceOptions) -> Tokenizer:
    chosen = options.tokenizer if options.tokenizer is not None else "byte"
    if chosen != "bpe" and options.vocab_size is not None:
        raise UserError(
            "is for a tokenizer that is trained",
            field="--vocab-size",
            value=options.vocab_size,
            mend="add --tokenizer bpe, or leave it out",
        )
    if chosen == "byte":
        return ByteTokenizer()
    if chosen == "bpe":
        from dbtrain.data.text.subword import train_bpe  # the library is optional

        return train_bpe(documents.documents("train"), options.vocab_size or DEFAULT_VOCAB)
    path = Path(chosen).expanduser()
    if not path.exists():
        raise UserError(
            "there is no such tokenizer",
            field="--tokenizer",
            value=chosen,
            mend="write byte, bpe, or the path of a tokenizer.json",
        )
    return load_tokenizer(path, field="--tokenizer")
