"""Where images come from: one file a kind of source."""

from dbtrain.data.sources.base import Images, ImageSource, SourceOptions, open_source

__all__ = ["ImageSource", "Images", "SourceOptions", "open_source"]
