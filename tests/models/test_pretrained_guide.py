"""docs/pretrained.md is followed to the letter: its programs, its recipe and its command lines, in order."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from dbtrain.cli.main import run

GUIDE = Path(__file__).parents[2] / "docs" / "pretrained.md"


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    for language, block in re.findall(r"```(sh|python|yaml)\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        with contextlib.redirect_stdout(said):
            if language == "yaml":
                Path("tiny.yaml").write_text(block)
            elif language == "python":
                exec(block, {})
            else:
                for line in block.splitlines():
                    program, *arguments = shlex.split(line)
                    shorter = ["--set", "training.steps=10"] if arguments[0] == "train" else []
                    assert program == "dbtrain"
                    assert run([*arguments, *shorter]) == 0, line
    assert "\n<|end|>The " in said.getvalue()  # the last program: what the exported model read and wrote
    assert {path.name for path in Path("exported/tiny").iterdir()} > {"config.json", "tokenizer.json"}
