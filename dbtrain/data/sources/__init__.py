"""Where rows come from: one file a kind of source."""

from dbtrain.data.sources.base import Source, SourceOptions

__all__ = ["Source", "SourceOptions"]
