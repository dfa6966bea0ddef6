"""The random hierarchy model (Cagnetta et al. 2024): labels that only a composition of rules tells from the input.

    python benchmarks/hierarchy.py hierarchy --rows 20000
    dbtrain prepare hierarchy --name hierarchy

A class becomes two symbols, each of these two others, and so on: at every level a symbol has `--synonyms` pairs that
stand for it, drawn once, and which of them is taken is chance. No pair stands for two symbols, so the label follows
from the symbols of the last level, by as many steps as there are levels. The symbols are 2 x 2 pixels each, row by row
of an 8 x 8 image, the rest of which is empty. Writes Parquet files in the layout of image sets on the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SYMBOLS = 8
"""Symbols of each level, and classes."""
_SIDE, _PATCH = 8, 2

Symbols = npt.NDArray[np.int64]


def draw_rules(levels: int, synonyms: int, chance: np.random.Generator) -> list[Symbols]:
    """Of each level the pairs that stand for a symbol, (SYMBOLS, synonyms, 2)."""
    pairs = np.stack(np.divmod(np.arange(SYMBOLS**2), SYMBOLS), axis=1)
    return [chance.permutation(pairs)[: SYMBOLS * synonyms].reshape(SYMBOLS, synonyms, 2) for _ in range(levels)]


def draw_rows(rules: list[Symbols], rows: int, chance: np.random.Generator) -> tuple[Symbols, Symbols]:
    """Labels (rows,) and the symbols of the last level (rows, 2^levels)."""
    labels = chance.integers(SYMBOLS, size=rows)
    symbols = labels[:, None]
    for rule in rules:
        symbols = rule[symbols, chance.integers(rule.shape[1], size=symbols.shape)].reshape(rows, -1)
    return labels, symbols


def to_image(symbols: Symbols) -> bytes:
    """A PNG: three pixels of a patch say the symbol's bits, the fourth that there is one."""
    pixels = np.full((_SIDE, _SIDE), 128, np.uint8)
    for place, symbol in enumerate(symbols):
        top, left = (_PATCH * part for part in divmod(place, _SIDE // _PATCH))
        bits = [255 * (int(symbol) >> bit & 1) for bit in range(3)]
        pixels[top : top + _PATCH, left : left + _PATCH] = np.array([*bits, 255]).reshape(_PATCH, _PATCH)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Write train and test files; the same arguments give the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--levels", type=int, default=3, choices=range(1, 5))
    parser.add_argument("--synonyms", type=int, default=4, choices=range(1, SYMBOLS + 1))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--test-rows", type=int, default=2_000)
    arguments = parser.parse_args()
    chance = np.random.default_rng(0)
    rules = draw_rules(arguments.levels, arguments.synonyms, chance)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", arguments.rows), ("test", arguments.test_rows)):
        labels, symbols = draw_rows(rules, rows, chance)
        images = [{"bytes": to_image(row), "path": None} for row in symbols]
        table = pa.table({"image": pa.array(images), "label": labels})
        pq.write_table(table, arguments.folder / f"{split}-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
