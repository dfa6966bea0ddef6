"""The manifest of a folder of shards: what is in it, how much of it, and the digests that prove it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dbtrain.errors import CorruptData, UserError
from dbtrain.plan import DatasetFacts

MANIFEST_FILE = "manifest.json"

Split = Literal["train", "test"]

FileName = Annotated[str, Field(pattern=r"^(cold/)?[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ImageShape(_Record):
    """Shape of every image, channels first."""

    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)

    @property
    def bytes(self) -> int:
        """Bytes of one image, one a channel and pixel."""
        return self.channels * self.height * self.width

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


class ColdCopy(_Record):
    """The zstd-compressed twin of a shard."""

    file: FileName
    bytes: int
    sha256: str


class ShardFile(_Record):
    """One shard: an Arrow IPC file with a single record batch."""

    file: FileName
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str
    cold: ColdCopy | None = None


class SplitFiles(_Record):
    """The shards of one split, in row order."""

    rows: int = Field(ge=1)
    shards: tuple[ShardFile, ...] = Field(min_length=1)


class Manifest(_Record):
    """What `dbtrain prepare` wrote."""

    version: Literal[1] = 1
    """Of this format."""
    source: str
    """What the shards were made from, as `dbtrain prepare` was told (a local path is absolute)."""
    kind: Literal["image"] = "image"
    image: ImageShape
    class_names: tuple[str, ...] = Field(min_length=1)
    """Names of the labels 0, 1, ..."""
    splits: dict[Split, SplitFiles]
    mean: tuple[float, ...]
    """Mean of each channel over the training rows, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Their standard deviation; 1 for a constant channel, so that it can divide."""

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            UserError: there is none.
            CorruptData: it is not a manifest.
        """
        path = folder / MANIFEST_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"holds no prepared data ({MANIFEST_FILE} is missing)",
                field="data.path",
                value=folder,
                mend=f"make it with `dbtrain prepare SOURCE --out {folder}`",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptData(f"cannot be read: {error}", field="manifest", value=path) from None
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
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        problem = None
        if set(self.splits) != {"train", "test"}:
            problem = f"has the splits {sorted(self.splits)}, not train and test"
        elif len(self.mean) != self.image.channels or len(self.std) != self.image.channels:
            problem = f"mean and std need one value for each of the {self.image.channels} channels"
        else:
            for name, split in self.splits.items():
                if sum(shard.rows for shard in split.shards) != split.rows:
                    problem = f"the shards of {name} do not add up to its {split.rows} rows"
        if problem is not None:
            raise CorruptData(problem, field="manifest", value=path)

    def to_json(self) -> str:
        """The text of the manifest file."""
        return self.model_dump_json(indent=2) + "\n"

    def facts(self) -> DatasetFacts:
        """What a run has to know.

        The digest covers rows, their order, labels, shape and class names; not file names, cold copies or
        where the data came from.
        """
        content = {
            "kind": self.kind,
            "image": self.image.model_dump(),
            "class_names": self.class_names,
            "splits": {
                name: [[shard.rows, shard.sha256] for shard in split.shards]
                for name, split in sorted(self.splits.items())
            },
        }
        return DatasetFacts(
            sha256=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
            train_rows=self.splits["train"].rows,
            test_rows=self.splits["test"].rows,
            class_names=self.class_names,
            mean=self.mean,
            std=self.std,
        )
