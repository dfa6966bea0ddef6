"""What of a block's module is its stem, all that is not in its layers; and which runs may average stems."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.plan import Kind

_LAYERS = "layers."  # every family calls them so


def averages_stems(config: RunConfig, kind: Kind) -> bool:
    """Whether the workers of a run meet to average their stems; the end-to-end network has nobody to meet."""
    return config.blocks.stem == "averaged" and kind == "blocks"


def check_backend_meets(config: RunConfig, kind: Kind) -> None:
    """Asked by a backend whose blocks train one after the other.

    Raises:
        UserError: the run averages stems.
    """
    if averages_stems(config, kind):
        raise UserError(
            "needs blocks that train at the same time, and here they train one after the other",
            field="blocks.stem",
            value="averaged",
            mend="use --backend ray, or set blocks.stem=private",
        )


def stem_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters outside the layers (embeddings, final norm, head), by name."""
    named = module.named_parameters()
    return {name: value for name, value in named if value.requires_grad and not name.startswith(_LAYERS)}


def check_same_stems(blocks: Sequence[nn.Module]) -> None:
    """Whether a mean over the blocks' stems exists: each has the same parameters outside its layers.

    Raises:
        UserError: they differ, or nothing tells stem from layers. None of the families here is like that.
    """
    shapes = [{name: tuple(value.shape) for name, value in stem_of(block).items()} for block in blocks]
    problem = None
    if not shapes[0] or not any(name.startswith(_LAYERS) for name, _ in blocks[0].named_parameters()):
        problem = "the blocks of this family have no parameters inside and outside `layers`, which tells stems apart"
    for index, other in enumerate(shapes):
        for name in sorted(shapes[0].keys() | other.keys()):
            if shapes[0].get(name) != other.get(name):
                problem = (
                    f"{name} has the shape {shapes[0].get(name)} in block 0 and {other.get(name)} in block {index}"
                )
    if problem is not None:
        raise UserError(problem, field="blocks.stem", value="averaged", mend="set blocks.stem=private")
