"""`dbtrain report`: what the page says against the run's files, and what it must never do."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import assert_refused, dbtrain, tree, unchanged
from object_store import ObjectStore
from PIL import Image
from report_page import Page, assert_harmless
from small_runs import start_run, train_block

from dbtrain.config import RunConfig
from dbtrain.inference.compare import driven_seconds
from dbtrain.inference.evaluation import ACCURACY, Evaluation
from dbtrain.monitoring.report.gather import gather
from dbtrain.plan import human_bytes
from dbtrain.run_directory import RunDirectory

CRAFTED = "</td></table><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\x00\ud800"


def _page(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert_harmless(page)
    return page


def _evaluation(run: Path) -> Evaluation:
    return Evaluation.from_json(json.loads((run / "evaluation.json").read_text())["evaluation"])


def test_the_page_says_what_the_files_say(trained_runs: Path, place: Path) -> None:
    run, baseline = trained_runs / "run", trained_runs / "baseline"
    with unchanged(trained_runs):
        result = dbtrain("report", run, baseline, "--out", "page.html")
    assert (result.code, result.stdout, result.stderr) == (0, "page.html\n", "")
    page = _page(place / "page.html")
    ours, theirs = RunDirectory.open(run), RunDirectory.open(baseline)

    settings = {row[0]: row[1:] for row in page.tables["settings"][0]}
    assert settings["training.steps"] == ["20"]
    assert page.rows("configuration")["training.batch_size"][:2] == ["16", "128"]

    plan = page.rows("plan")
    for block in ours.plan.blocks:
        row = plan[f"block {block.index}"]
        assert row[0] == f"{block.layers[0]}–{block.layers[1] - 1}"
        assert row[3] == f"{block.parameters:,}"
        flops = float(row[5])
        assert flops == pytest.approx(20 * 16 * block.flops_per_sample, rel=0.01)
    assert plan["end to end"][3] == f"{theirs.plan.blocks[0].parameters:,}"

    progress = page.rows("losses")
    for block in ours.plan.blocks:
        state, steps, loss, *_ = progress[f"block {block.index}"]
        assert (state, steps) == ("finished", "20 of 20")
        assert float(loss) == pytest.approx(ours.block(block.index).metrics()[-1]["loss"], rel=1e-3)

    mine, other = _evaluation(run), _evaluation(baseline)
    beside = page.rows("quality")
    assert beside["accuracy, % on test, as used"] == [mine.metric.show(mine.value), other.metric.show(other.value)]
    assert beside["layer-evaluations of the training"] == [
        f"{ours.plan.layer_evaluations:,}",
        f"{theirs.plan.layer_evaluations:,}",
    ]
    wall = [f"{driven_seconds(each.events())[0]:,.1f}" for each in (ours, theirs)]
    assert beside["wall time, s"] == wall
    readouts = page.rows("quality", 1)
    for title, name, of in (("product (in use)", "product", mine), ("end to end: accuracy", "accuracy", other)):
        assert readouts[title] == [of.metric.show(of.readouts[name]), f"{100 * of.calibration[name]:.2f}"]
    heads, *along = page.tables["quality"][2]
    column = list(heads).index("product so far, %")
    assert [row[column] for row in along] == [f"{100 * point['so_far']:.2f}" for point in mine.chain]

    memory = page.rows("memory")
    heads = memory[""]
    for block in ours.plan.blocks:
        row = dict(zip(heads, memory[f"block {block.index}"], strict=True))
        assert row["activations"] == human_bytes(block.bytes.activations)
        assert row["planned in all"] == human_bytes(block.bytes.total)
        peak = max(line["peak_memory"] for line in ours.block(block.index).metrics())
        assert row["measured peak"] == human_bytes(peak)

    machine = page.rows("machines")
    told = json.loads((run / "blocks/00/workers.jsonl").read_text().splitlines()[0])
    assert machine["machine"] == [told["machine"]]
    assert machine["torch"] == [told["versions"]["torch"]]
    assert machine["blocks"] == ["0, 1, 2"]

    about = json.loads((run / "model/config.json").read_text())
    assert page.rows("again")["weights, SHA-256"] == [about["sha256"]]
    assert page.rows("again")["configuration, SHA-256"] == [ours.config.digest()]
    assert f"dbtrain train {run}/config.yaml" in page.words["again"]
    assert "Nothing disturbed this run" in page.words["faults"]


def test_one_run_alone_goes_into_its_directory(run_copy: Path, trained_runs: Path) -> None:
    result = dbtrain("report", run_copy, "--json")
    assert result.json()["missing"] == []
    assert result.json()["report"] == str(run_copy / "report.html")
    page = _page(run_copy / "report.html")
    assert page.rows("plan")["end to end"]  # as it is planned
    assert page.rows("memory")["end to end"][-1] == "not recorded"
    first = (run_copy / "report.html").stat().st_ino
    assert dbtrain("report", run_copy).code == 0
    assert (run_copy / "report.html").stat().st_ino != first  # replaced whole
    # The commands of the page are those that the verbs take.
    assert "dbtrain assemble small-again" in page.words["again"]
    shutil.copytree(trained_runs / "baseline", run_copy.parent / "whole")
    result = dbtrain("report", run_copy.parent / "whole", "--json")
    assert result.json()["state"] == "finished"
    page = _page(run_copy.parent / "whole/report.html")
    assert list(page.rows("plan")) == ["", "end to end"]
    assert "dbtrain baseline" in page.words["again"]


def test_what_is_missing_is_said(small_config: Callable[..., RunConfig], place: Path) -> None:
    run = start_run(small_config(training={"steps": 4}), place / "run")
    result = dbtrain("report", "run")
    assert result.code == 0
    assert "The run is new" in result.stderr
    page = _page(place / "run/report.html")
    assert "Nothing was measured yet" in page.words[""]
    assert "not assembled" in page.words[""]
    assert "Not recorded" in page.words["machines"]
    train_block(run, 1)
    page = _page(Path(dbtrain("report", "run", "--json").json()["report"]))
    assert "Nothing was measured yet" not in page.words[""]
    assert page.rows("losses")["block 1"][1] == "4 of 4"
    assert page.rows("losses")["block 0"][1:3] == ["0 of 4", "–"]


def test_an_evaluation_of_another_model_is_not_shown(run_copy: Path) -> None:
    path = run_copy / "evaluation.json"
    whole = json.loads(path.read_text())
    for change in (
        lambda kept: kept["of"].update(sha256="0" * 64),
        lambda kept: kept["of"]["chain"].update(start_noises=9),
        lambda kept: kept["evaluation"]["chain"][0].pop("accuracy"),
        lambda kept: kept["evaluation"]["chain"][0].update(sigma="<b>"),
        lambda kept: kept["evaluation"].update(predict="dice"),
        lambda kept: kept.clear(),
    ):
        kept = json.loads(json.dumps(whole))
        change(kept)
        path.write_text(json.dumps(kept))
        side = gather(RunDirectory.open(run_copy)).ours
        assert side.evaluation is None
        [sentence] = side.missing
        assert "of another model" in sentence
    path.unlink()
    [sentence] = dbtrain("report", run_copy, "--json").json()["missing"]
    assert "Nothing was evaluated" in sentence
    assert "dbtrain evaluate" in sentence
    assert not path.exists()  # a report evaluates nothing
    (run_copy / "model/config.json").write_text("{")
    [sentence] = dbtrain("report", run_copy, "--json").json()["missing"]
    assert "dbtrain assemble" in sentence


def test_a_baseline_that_was_measured_on_something_else(run_copy: Path, trained_runs: Path, place: Path) -> None:
    shutil.copytree(trained_runs / "baseline", place / "baseline")
    path = place / "baseline/evaluation.json"
    kept = json.loads(path.read_text())
    kept["of"]["split"] = kept["evaluation"]["split"] = "train"
    path.write_text(json.dumps(kept))
    [sentence] = dbtrain("report", run_copy, place / "baseline", "--json").json()["missing"]
    assert "evaluated on train, the run on test" in sentence
    quality = _page(run_copy / "report.html").rows("quality")
    assert quality["accuracy, % on test, as used"] == [ACCURACY.show(_evaluation(run_copy).value), "–"]


def test_what_workers_write_stays_text(run_copy: Path) -> None:
    """Names, reasons and facts come from other machines; a log line may hold anything."""
    run = RunDirectory.open(run_copy)
    here = {"block": 1, "attempt": 1, "step": 10}
    run.journal({"event": "block_restarting", **here, "reason": CRAFTED, "backoff": 0.5})
    run.journal({"event": "block_failed", **here, "reason": CRAFTED, "traceback": CRAFTED})
    run.journal({"event": "nodes_changed", "nodes": {CRAFTED: 1}})
    run.block(1).log_worker({"attempt": 2, "step": 10, "machine": CRAFTED, "versions": {CRAFTED: CRAFTED}})
    config = run_copy / "config.yaml"
    config.write_text(config.read_text().replace("source: digits", f"source: digits\n  cache: {CRAFTED[:-4]!r}"))
    assert dbtrain("report", run_copy).code == 0
    page = _page(run_copy / "report.html")
    assert "<script>alert(1)</script>" in page.words["faults"]
    assert "<script>alert(1)</script>" in page.words["machines"]
    text = (run_copy / "report.html").read_text(encoding="utf-8")
    assert not [character for character in text if ord(character) < 32 and character not in "\n\t"]
    assert page.rows("losses")["block 1"][0] == "failed"


def test_keys_in_an_address_are_left_out(run_copy: Path) -> None:
    config = run_copy / "config.yaml"
    lines = config.read_text().splitlines()
    config.write_text(
        "\n".join("  path: s3://KEY:SECRET@bucket/digits" if "path: " in line else line for line in lines)
    )
    assert dbtrain("report", run_copy).code == 0
    text = (run_copy / "report.html").read_text()
    assert "s3://bucket/digits" in text
    assert "SECRET" not in text


def test_torn_and_strange_lines(run_copy: Path) -> None:
    for name in ("events.jsonl", "blocks/00/metrics.jsonl", "blocks/01/workers.jsonl"):
        with (run_copy / name).open("ab") as file:
            file.write(b'\xff\xfe\n[1]\n{"time": 1e400, "step": 1}\n{"event": "run_started", "time": "x"}\n{"tim')
    assert dbtrain("report", run_copy, "--json").json()["state"] == "finished"
    for name in ("events.jsonl", "blocks/00/metrics.jsonl", "blocks/01/workers.jsonl"):
        (run_copy / name).unlink()
    assert dbtrain("report", run_copy, "--json").json()["state"] == "new"
    assert "No losses" not in _page(run_copy / "report.html").words["losses"]  # the other blocks'


def test_machines_that_are_alike_share_a_column(run_copy: Path) -> None:
    run = RunDirectory.open(run_copy)
    told = json.loads((run_copy / "blocks/00/workers.jsonl").read_text().splitlines()[0])
    for block, change in ((0, {"machine": "second"}), (1, {"machine": "third", "cores": 64, "device": "H100"})):
        run.block(block).log_worker({**told, "attempt": 2, **change})
    assert dbtrain("report", run_copy).code == 0
    machines = _page(run_copy / "report.html").rows("machines")
    assert machines["machine"] == [f"{told['machine']}, second", "third"]
    assert machines["blocks"] == ["0, 1, 2", "1"]
    assert machines["attempts"] == ["4", "1"]
    assert machines["device"][1] == "H100"


def test_pictures_of_a_run_are_inside(run_copy: Path) -> None:
    (run_copy / "samples").mkdir()
    png = io.BytesIO()
    Image.new("L", (8, 8), 128).save(png, "PNG")
    (run_copy / "samples/samples.png").write_bytes(png.getvalue())
    assert dbtrain("report", run_copy).code == 0
    assert "img" in _page(run_copy / "report.html").tags
    (run_copy / "samples/samples.png").write_bytes(b"<script>alert(1)</script>")  # is no picture
    assert dbtrain("report", run_copy).code == 0
    assert "img" not in _page(run_copy / "report.html").tags


def test_texts_are_drawn_when_asked_for(texts: Path, place: Path) -> None:
    with unchanged(texts):
        drawn = dbtrain(
            "report", texts / "causal_lm", texts / "baseline", "--samples", 2, "--prompt", "<b>", "--out", "a"
        )
        assert drawn.code == 0, drawn.stderr
        assert dbtrain("report", texts / "masked_lm", "--samples", 1, "--out", "b").code == 0
        assert dbtrain("report", texts / "masked_lm", "--out", "c").code == 0
    page = _page(place / "a")
    assert page.tags.count("blockquote") == 2
    assert page.words["samples"].count("<b>") >= 2
    assert _page(place / "b").tags.count("blockquote") == 1
    page = _page(place / "c")
    assert "--samples" in page.words["samples"]
    assert "noise ranges of the blocks" in page.words["plan"]


def test_samples_of_a_run_that_is_not_assembled(family_config: Callable[..., RunConfig], place: Path) -> None:
    run = start_run(family_config("dit", training={"steps": 1}), place / "run")
    assert_refused(dbtrain("report", "run", "--samples", 1), "block 0")
    for block in run.plan.blocks:
        train_block(run, block.index)
    assert dbtrain("report", "run", "--samples", 2).code == 0
    assert "img" in _page(place / "run/report.html").tags


def test_runs_by_their_uris(trained_runs: Path, run_copy: Path, place: Path, object_store: ObjectStore) -> None:
    local = dbtrain("report", f"file://{run_copy}", "--json").json()["report"]
    assert local == str(run_copy / "report.html")
    shutil.copytree(trained_runs / "baseline", object_store.folder / "baseline")
    remote = object_store.uri("baseline")
    assert dbtrain("report", f"file://{run_copy}", remote, "--out", "page.html").code == 0
    page = _page(place / "page.html")
    assert page.rows("losses")
    assert "dbtrain baseline config.yaml" in page.words["again"]  # nobody's shell opens s3://


def test_mistakes(trained_runs: Path, run_copy: Path, texts: Path, place: Path) -> None:
    run, baseline = trained_runs / "run", trained_runs / "baseline"
    before = tree(trained_runs)
    refused = [
        (("nowhere",), "RUN", "nowhere", "not a run directory"),
        ((run, "nowhere"), "nowhere"),
        ((run, run), "BASELINE", "no end-to-end run", "dbtrain baseline"),
        ((baseline, run), "BASELINE", "swap"),
        ((texts / "masked_lm", texts / "baseline"), "BASELINE", "family"),
        ((run, "--out", place), "--out", "is a folder", "report.html"),
        ((run, "--out", "no/such/file.html"), "--out", "not there"),
        ((run, "--samples", "0"), "--samples", "at least 1"),
        ((run, "--samples", "many"), "--samples", "many"),
        ((run, "--samples", "4"), "--samples", "makes none"),
        ((run, "--prompt", "x"), "--prompt", "--samples"),
        ((texts / "masked_lm", "--samples", "1", "--prompt", "x"), "--prompt"),
    ]
    for arguments, *parts in refused:
        assert_refused(dbtrain("report", *arguments), *parts)
    assert tree(trained_runs) == before
    assert sorted(path.name for path in place.iterdir()) == ["run"]
    (run_copy / "report.html").mkdir()  # where the page should go
    assert_refused(dbtrain("report", run_copy), "--out", "report.html")
