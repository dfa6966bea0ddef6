"""dbtrain: train a transformer as independent denoising blocks, one worker a block, and assemble one model.

import dbtrain

model = dbtrain.load("runs/demo/vit")
for answer in model.predict(["image.png"]):
    print(answer.label, answer.probability)
"""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from dbtrain.errors import CorruptData, UserError

if TYPE_CHECKING:
    import torch

    from dbtrain.inference.front_door import FrontDoor

__version__ = _version("dbtrain")
__all__ = ["CorruptData", "UserError", "__version__", "load"]


def load(path: str, device: str | torch.device = "cpu") -> FrontDoor:
    """The model in a run directory, a model folder or on the hub, ready to `predict`, `sample`, `generate` or `infill`.

    Args:
        path: a local path, any pyarrow filesystem URI (s3://..., gs://...), or a model of the Hugging Face hub
            (`hf:owner/name`, `hf:owner/name@revision`). A run that is finished and not assembled yet is assembled
            first.
        device: where inference runs.

    Raises:
        UserError: there is no assembled model at `path`, nor a finished run; or the hub does not give it.
        CorruptData: its files are damaged.
    """
    # PyTorch takes seconds to import; programs that only look at the version or the errors do not pay for it.
    from dbtrain.inference.front_door import open_model
    from dbtrain.inference.runs import model_at

    return open_model(model_at(str(path), device))
