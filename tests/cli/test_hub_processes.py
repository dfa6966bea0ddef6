"""The hub as a process of its own meets it: by its environment, first with a network, then without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import dbtrain
from hub_server import TOKEN, HubServer, environment
from PIL import Image

PROGRAM = """
import sys
import dbtrain.assembly.export, dbtrain.data.prepare, dbtrain.inference.runs
from dbtrain.cli.main import run

print(sorted({name.partition(".")[0] for name in sys.modules} & {"datasets", "huggingface_hub"}))
shards, *image = sys.argv[1:]
sys.exit(run(["prepare", "hf:me/texts", "--length", "8", "--out", shards]) or run(["predict", "hf:me/vit", *image]))
"""


@pytest.mark.slow
def test_online_then_offline(trained_runs: Path, hub: HubServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = hub.repository("datasets", "me/texts")
    texts.mkdir(parents=True)
    (texts / "train.jsonl").write_text('{"text": "a few words"}\n' * 40)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sent = dbtrain("export", trained_runs / "run", "--out", "out", "--push", "me/vit", "--json")
    assert sent.code == 0, sent.stderr
    Image.new("L", (8, 8)).save("image.png")
    said = []
    for shards, offline in (("first", False), ("second", True)):
        if offline:
            hub.close()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, shards, "image.png"],
            env=kept | environment(place / "home", hub.url, offline=offline),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("[]\n")  # neither library before it is needed
        assert "Traceback" not in done.stderr
        said.append(done.stdout.replace("second", "first"))
    assert said[0] == said[1]
    assert (place / "first" / "manifest.json").read_bytes() == (place / "second" / "manifest.json").read_bytes()
