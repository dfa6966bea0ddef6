"""The manifest of a folder of shards: what is in it, how much of it, and the digests that prove it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from dbtrain.data.columns import Column, ImageShape, Record, token_column
from dbtrain.errors import CorruptData, UserError
from dbtrain.model_config import DataKind
from dbtrain.plan import DatasetFacts

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

FileName = Annotated[str, Field(pattern=r"^(cold/)?[A-Za-z0-9][A-Za-z0-9._-]*$")]


class ColdCopy(Record):
    """The zstd-compressed twin of a shard."""

    file: FileName
    bytes: int
    sha256: str


class ShardFile(Record):
    """One shard: an Arrow IPC file with a single record batch."""

    file: FileName
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str
    cold: ColdCopy | None = None


class SplitFiles(Record):
    """The shards of one split, in row order."""

    rows: int = Field(ge=1)
    shards: tuple[ShardFile, ...] = Field(min_length=1)


class TextSplit(Record):
    """What was packed into the windows of one split."""

    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    """Of all documents, the separator behind each included."""
    dropped: int = Field(ge=0)
    """Of them the last ones, which fill no window."""


class TextFacts(Record):
    """What the windows of a text are made of."""

    length: int = Field(ge=2)
    """Tokens in a window."""
    vocab_size: int = Field(ge=2)
    """Number of token ids, the separator included."""
    separator: int = Field(ge=0)
    """Id of the token that ends every document; it begins a text as well."""
    tokenizer: str
    """What kind of tokenizer stands in the folder's `tokenizer.json`: `byte`, `bpe`, ..."""
    tokenizer_sha256: str
    """Digest of that file."""
    splits: dict[Split, TextSplit]


class Manifest(Record):
    """What `dbtrain prepare` wrote."""

    version: Literal[2] = 2
    """Of this format."""
    source: str
    """What the shards were made from, as `dbtrain prepare` was told (a local path is absolute)."""
    kind: DataKind
    """What a row is: an image, the latent of one, or a window of text."""
    columns: tuple[Column, ...]
    """Of every row: `image` and `label`, or `tokens`."""
    class_names: tuple[str, ...]
    """Names of the labels 0, 1, ...; none for text, and for latents without labels, whose label is 0."""
    splits: dict[Split, SplitFiles]
    mean: tuple[float, ...]
    """Mean of each channel over the training rows: of pixels in [0, 1], or of latents as they are; none for text."""
    std: tuple[float, ...]
    """Their standard deviation; 1 for a constant channel, so that it can divide."""
    text: TextFacts | None = None
    """About the text."""

    @property
    def image(self) -> ImageShape:
        """Shape of every image or latent; asked of these alone."""
        assert self.kind != "text"
        channels, height, width = self.columns[0].shape
        return ImageShape(channels=channels, height=height, width=width)

    @property
    def shards(self) -> list[ShardFile]:
        """The shards of both splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            UserError: there is none, or it is of an older format.
            CorruptData: it is not a manifest.
        """
        path = folder / MANIFEST_FILE
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"holds no prepared data ({MANIFEST_FILE} is missing)",
                field="data.path",
                value=folder,
                mend=f"make it with `dbtrain prepare SOURCE --out {folder}`",
            ) from None
        except OSError as error:
            raise CorruptData(f"cannot be read: {error}", field="manifest", value=path) from None
        return cls.parse(data, str(folder), str(path))

    @classmethod
    def parse(cls, data: bytes, folder: str, path: str) -> Manifest:
        """The manifest that `data` is, the content of the file `path` in `folder`.

        Raises:
            UserError: it is of an older format.
            CorruptData: it is not a manifest.
        """
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise CorruptData(f"cannot be read: {error}", field="manifest", value=path) from None
        _refuse_older(text, folder)
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise CorruptData(
                f"is not a manifest: {where}: {first['msg']}",
                field="manifest",
                value=path,
                mend="prepare the data again with --overwrite",
            ) from None
        problem = manifest._problem()
        if problem is not None:
            raise CorruptData(problem, field="manifest", value=path, mend="prepare the data again with --overwrite")
        return manifest

    def _problem(self) -> str | None:
        """What does not agree with what, if anything."""
        if set(self.splits) != set(SPLITS):
            return f"has the splits {sorted(self.splits)}, not train and test"
        for name, split in self.splits.items():
            if sum(shard.rows for shard in split.shards) != split.rows:
                return f"the shards of {name} do not add up to its {split.rows} rows"
        return self._text_problem() if self.kind == "text" else self._image_problem()

    def _image_problem(self) -> str | None:
        first = self.columns[0] if self.columns else None
        dtypes = ("uint8",) if self.kind == "image" else ("float16", "float32")
        if first is None or len(first.shape) != 3 or first.dtype not in dtypes:
            return f"its columns do not hold {self.kind}s"
        if self.columns != self.image.columns(first.dtype):
            return f"its columns are ({', '.join(map(str, self.columns))}), not image and label"
        if len(self.mean) != self.image.channels or len(self.std) != self.image.channels:
            return f"mean and std need one value for each of the {self.image.channels} channels"
        if self.kind == "image" and not self.class_names:
            return "images need class names"
        return "images have no text" if self.text is not None else None

    def _text_problem(self) -> str | None:
        text = self.text
        if text is None or set(text.splits) != set(SPLITS):
            return "lacks what was packed into the windows of text"
        if self.columns != (token_column(text.length, text.vocab_size),) or text.separator >= text.vocab_size:
            return f"its columns do not hold windows of {text.length} tokens out of {text.vocab_size}"
        for name, part in text.splits.items():
            if self.splits[name].rows * text.length + part.dropped != part.tokens:
                return f"the windows of {name} do not add up to its {part.tokens} tokens"
        return None

    def to_json(self) -> str:
        """The text of the manifest file."""
        return self.model_dump_json(indent=2) + "\n"

    def facts(self) -> DatasetFacts:
        """What a run has to know.

        The digest covers rows, their order, labels, columns, class names and tokenizer; not file names, cold copies
        or where the data came from.
        """
        text = self.text
        content = {
            "kind": self.kind,
            "columns": [column.model_dump() for column in self.columns],
            "class_names": self.class_names,
            "splits": {
                name: [[shard.rows, shard.sha256] for shard in split.shards]
                for name, split in sorted(self.splits.items())
            },
            "text": None if text is None else [text.vocab_size, text.separator, text.tokenizer_sha256],
        }
        return DatasetFacts(
            sha256=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            kind=self.kind,
            shape=self.columns[0].shape,
            train_rows=self.splits["train"].rows,
            test_rows=self.splits["test"].rows,
            class_names=self.class_names,
            mean=self.mean,
            std=self.std,
            vocab_size=None if text is None else text.vocab_size,
            separator=None if text is None else text.separator,
            tokenizer_sha256=None if text is None else text.tokenizer_sha256,
        )


def _refuse_older(text: str, folder: str) -> None:
    try:
        raw = json.loads(text)
    except ValueError:
        return
    if isinstance(raw, dict) and raw.get("version") == 1:
        raise UserError(
            "was prepared by an older version, in a format that is read no more",
            field="data.path",
            value=folder,
            mend=f"prepare it again with `dbtrain prepare {raw.get('source', 'SOURCE')} --out {folder} --overwrite`",
        )
