"""`python -m dbtrain.monitoring.web.draw RUN FOLDER`: samples from the newest checkpoints of a run, into a folder.

A process of its own, of low priority. `answer.json` names the steps of the blocks and holds texts; `samples.png` shows
images. The run directory is only read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.loading import load_model
from dbtrain.errors import UserError
from dbtrain.inference.front_door import open_model
from dbtrain.inference.generate import TextGenerator
from dbtrain.inference.sample_files import grid
from dbtrain.inference.sample_images import ImageSampler
from dbtrain.inference.unmask import TextUnmasker
from dbtrain.models import family_of
from dbtrain.monitoring.pictures import PROMPT
from dbtrain.run_directory import TOKENIZER, BlockDirectory, RunDirectory
from dbtrain.storage import Storage

IMAGES = 36
ROWS = 4
"""Of a column a class."""
WIDEST = 16
"""Images in a row, at most."""
TEXTS = 3
TOKENS = 120
"""Of a continued text, at most."""


class _Aside(RunDirectory):
    """A run whose blocks are read where they are, and whose model is written into another folder."""

    def __init__(self, run: RunDirectory, folder: Path):
        super().__init__(Storage.open(folder), run.config, run.plan)
        self._run = run
        if run.storage.exists(TOKENIZER):
            self.storage.write_atomic(TOKENIZER, run.storage.read_bytes(TOKENIZER))

    def block(self, index: int) -> BlockDirectory:
        return self._run.block(index)


def draw(run: RunDirectory, folder: Path) -> dict[str, Any]:
    """Assemble what the blocks have saved and ask the model; always with the same seed, so that progress shows.

    Returns:
        the steps of the blocks, and "texts" or "about", which says what there is instead of a picture.

    Raises:
        UserError: a block has saved nothing yet, or the model's answers are not finite.
        CorruptData: a checkpoint is damaged.
    """
    aside = _Aside(run, folder)
    model = load_model(assemble(aside, partial=True).path)
    answer: dict[str, Any] = {"steps": list(model.steps), "weights": model.weights}
    task = family_of(run.config).task
    if task == "classify":
        return {**answer, "about": "The model classifies images; it has nothing to draw."}
    front = open_model(model)
    if task == "generate_images":
        sampler = cast("ImageSampler", front)
        # Samples have the classes in turn: a column a class, if these are not too many for a row.
        columns = sampler.num_classes if sampler.num_classes in range(2, WIDEST + 1) else None
        images = sampler.sample(IMAGES if columns is None else ROWS * columns)
        if images.dtype != np.uint8:
            return {**answer, "about": "The model makes latents, which only their own decoder can show."}
        grid(images, columns=columns).save(folder / "samples.png")
        return answer
    if task == "unmask_text":
        texts = cast("TextUnmasker", front).generate(TEXTS)
        return {**answer, "texts": [["", text] for text in texts]}
    generator = cast("TextGenerator", front)
    room = generator.length - len(generator.tokenizer.encode(PROMPT, field="prompt"))
    texts = generator.generate([PROMPT] * TEXTS, tokens=min(TOKENS, room))
    return {**answer, "texts": [[PROMPT, text] for text in texts]}


def main(uri: str, folder: str) -> int:
    """Draw, and write down what came of it. Exit code 2 and one line where it cannot be done."""
    os.nice(19)
    torch.set_num_threads(1)
    try:
        answer = draw(RunDirectory.open(uri), Path(folder))
    except UserError as mistake:
        print(" ".join(str(mistake).split()), file=sys.stderr)
        return 2
    (Path(folder) / "answer.json").write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
