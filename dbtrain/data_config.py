"""The section `data` of a `RunConfig`: which samples, where their shards lie, and how images are distorted."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import Field, field_validator

from dbtrain.model_config import Section

BUILT_IN_SOURCES = ("digits", "topics")


class RandAugmentConfig(Section):
    """RandAugment (Cubuk et al. 2020): `operations` random distortions in a row, each of strength `magnitude`."""

    operations: int = Field(2, ge=1, le=8)
    """How many distortions each image goes through."""
    magnitude: float = Field(9.0, ge=0.0, le=30.0)
    """Strength, on the paper's scale of 0 to 30."""


class AugmentConfig(Section):
    """Training-time distortions of images; each sample's are a function of (seed, block, sample position)."""

    crop_padding: int = Field(0, ge=0)
    """Zero padding before a random crop of the original size, pixels; 0 turns cropping off."""
    flip: bool = False
    """Mirror half of the images left to right."""
    randaugment: RandAugmentConfig | None = None
    """Further distortions; none by default."""


class DataConfig(Section):
    """Where the samples come from."""

    source: str = "digits"
    """`digits` (comes with scikit-learn) or `topics` (text of the standard library), prepared on first use; or a name
    for shards made by `dbtrain prepare`."""
    path: str | None = None
    """Folder of the prepared shards, or its URI on a filesystem that pyarrow opens (s3://, gs://, ...);
    `data/<source>` below the working directory when not given."""
    cache: str | None = Field(None, min_length=1)
    """Folder of this machine to which the shards are copied, once, before they are read. When not given, shards in a
    folder are read where they are, and those of a URI are copied to `dbtrain/shards` in the user's cache folder."""
    augment: AugmentConfig = AugmentConfig()
    """Training-time distortions."""

    @field_validator("cache")
    @classmethod
    def _of_this_machine(cls, cache: str | None) -> str | None:
        if cache is not None and "://" in cache:
            raise ValueError("has to be a folder of this machine, since shards are mapped into memory")
        return cache

    @property
    def location(self) -> str:
        """Where the shards are prepared, as `Storage.open` takes it: an absolute folder, or a URI."""
        path = self.path if self.path is not None else f"data/{self.source}"
        if path.startswith("file://"):
            path = url2pathname(urlsplit(path).path)
        return path if "://" in path else str(Path(path).expanduser().absolute())

    @property
    def remote(self) -> bool:
        """Whether `location` is a URI."""
        return "://" in self.location

    @property
    def shards(self) -> Path:
        """`location` as a path; asked of folders alone. `dbtrain.data.node_cache` knows where to read the shards."""
        assert not self.remote, f"{self.location} is no folder of this machine"
        return Path(self.location)

    @property
    def cached(self) -> bool:
        """Whether shards are copied to a folder of this machine before they are read."""
        return self.cache is not None or self.remote

    @property
    def cache_folder(self) -> Path:
        """The folder of the copies, absolute."""
        if self.cache is not None:
            return Path(self.cache).expanduser().absolute()
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(home).expanduser().absolute() / "dbtrain" / "shards"
