from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dbtrain
from dbtrain.assembly.assemble import assemble
from dbtrain.config import READOUTS
from dbtrain.data.loader import iterate_split
from dbtrain.data.shards import ShardSet
from dbtrain.data.transforms import EvalTransform
from dbtrain.diffusion.chain import read_out
from dbtrain.errors import CorruptData, UserError
from dbtrain.inference.accuracy import evaluate_classifier
from dbtrain.inference.classify import Classifier
from dbtrain.inference.evaluate import evaluate
from dbtrain.inference.evaluation import ACCURACY, Evaluation
from dbtrain.inference.runs import EVALUATION, evaluation_known, evaluation_of, model_of
from dbtrain.run_directory import RunDirectory


@pytest.fixture(scope="module")
def evaluation(classifier: Classifier) -> Evaluation:
    return evaluate(classifier.model)


def test_numbers_against_a_recount(classifier: Classifier, evaluation: Evaluation, digits: Path) -> None:
    shards = ShardSet.open(digits, "test")
    facts = classifier.model.plan.data
    assert facts is not None
    (batch,) = iterate_split(shards, EvalTransform(facts.mean, facts.std), shards.rows)
    images, labels = batch["image"], batch["label"]
    positions = np.arange(shards.rows)
    traces = [classifier.trace(images, positions, noise) for noise in range(3)]

    def accuracy(scores: torch.Tensor) -> float:
        return float((scores.argmax(-1) == labels).float().mean())

    assert evaluation.rows == shards.rows
    assert evaluation.readouts.keys() == set(READOUTS)
    assert all(0.0 <= value <= 1.0 for value in evaluation.readouts.values())
    assert evaluation.readouts["first"] == pytest.approx(accuracy(traces[0].log_probs[0]))
    assert evaluation.readouts["last"] == pytest.approx(accuracy(traces[0].log_probs[-1]))
    mean = torch.stack([trace.log_probs[0].exp() for trace in traces]).mean(0)
    assert evaluation.readouts["first_mean"] == pytest.approx(accuracy(mean))
    assert evaluation.readouts["first_mean"] > 0.3  # ten classes: labels and images go together
    for step, point in enumerate(evaluation.chain):
        each = [accuracy(trace.log_probs[step]) for trace in traces]
        nats = [-float(trace.log_probs[step].gather(1, labels[:, None]).mean()) for trace in traces]
        assert point["accuracy"] == pytest.approx(sum(each) / 3)
        assert point["cross_entropy"] == pytest.approx(sum(nats) / 3, rel=1e-4)
        assert (point["block"], point["sigma"]) == (traces[0].blocks[step], traces[0].sigmas[step])
        assert point["so_far"] == pytest.approx(accuracy(sum(traces[0].log_probs[: step + 1])))
    assert evaluation.chain[0]["so_far"] == evaluation.readouts["first"]
    assert evaluation.chain[-1]["so_far"] == evaluation.readouts["product"]
    assert [point["block"] for point in evaluation.alone] == [0, 1, 2]
    assert [point["sigma"] for point in evaluation.alone] == [own.high for own in classifier.model.ranges]
    # The first block has nobody before it: in the chain, from the same noise, it says what it says alone.
    first = -float(traces[0].log_probs[0].gather(1, labels[:, None]).mean())
    assert evaluation.alone[0]["cross_entropy"] == pytest.approx(first, rel=1e-4)


def test_the_chain_without_a_block(classifier: Classifier, evaluation: Evaluation, digits: Path) -> None:
    shards = ShardSet.open(digits, "test")
    facts = classifier.model.plan.data
    assert facts is not None
    (batch,) = iterate_split(shards, EvalTransform(facts.mean, facts.std), shards.rows)
    images, labels, positions = batch["image"], batch["label"], np.arange(shards.rows)
    assert [point["block"] for point in evaluation.without] == [0, 1, 2]
    # Without its last block the chain is the walk that stops before it.
    shorter = classifier.trace(images, positions, 0, stop_after=2)
    for name in ("last", "product"):
        hits = (read_out([shorter], name).argmax(-1) == labels).float().mean()
        assert evaluation.without[2][name] == pytest.approx(float(hits))
    # Without its first, the second says what it says alone, and hands that on.
    z = classifier.model.ranges[1].high * classifier.start(positions, 0)
    said = classifier.log_probs(classifier.features(images)[1], 1, z, classifier.model.ranges[1].high)
    trace = classifier.trace(images, positions, 0, skip={0})
    assert trace.blocks == (1, 2)
    assert torch.allclose(trace.log_probs[0], said, atol=1e-4)
    hits = (trace.log_probs[-1].argmax(-1) == labels).float().mean()
    assert evaluation.without[0]["last"] == pytest.approx(float(hits))


def test_calibration_against_a_recount(classifier: Classifier, evaluation: Evaluation, digits: Path) -> None:
    shards = ShardSet.open(digits, "test")
    facts = classifier.model.plan.data
    assert facts is not None
    (batch,) = iterate_split(shards, EvalTransform(facts.mean, facts.std), shards.rows)
    assert evaluation.calibration.keys() == evaluation.readouts.keys()
    for name in ("first", "product", "last_mean"):
        probabilities = classifier.probabilities(batch["image"], np.arange(shards.rows), name).double()
        top, answers = (value.numpy() for value in probabilities.max(dim=-1))
        hits = answers == batch["label"].numpy()
        expected = 0.0
        for lower in range(15):
            inside = (top > lower / 15) & (top <= (lower + 1) / 15)
            if inside.any():
                expected += inside.mean() * abs(hits[inside].mean() - top[inside].mean())
        assert evaluation.calibration[name] == pytest.approx(expected, abs=1e-5)
    again = evaluate_classifier(classifier, shards, batch_size=7)
    assert again.calibration == pytest.approx(evaluation.calibration, abs=0.01)


def test_batches_and_progress(classifier: Classifier, evaluation: Evaluation, digits: Path) -> None:
    shards = ShardSet.open(digits, "test")
    seen: list[tuple[int, int]] = []
    again = evaluate_classifier(
        classifier, shards, batch_size=100, progress=lambda done, total: seen.append((done, total))
    )
    assert again.readouts == pytest.approx(evaluation.readouts, abs=1.01 / again.rows)
    assert seen[0] == (100, again.rows)
    assert seen[-1] == (again.rows, again.rows)


def test_a_baseline(baseline: RunDirectory) -> None:
    found = evaluate(dbtrain.load(baseline.uri).model)
    assert (found.readouts.keys(), found.metric) == ({"accuracy"}, ACCURACY)
    assert (found.kind, found.predict, found.chain, found.alone) == ("end_to_end", "accuracy", (), ())
    assert 0.0 < found.calibration["accuracy"] < 1.0
    assert found.without == ()


def test_it_is_remembered_until_the_model_changes(own_run: RunDirectory) -> None:
    calls: list[int] = []

    def ask(**options: object) -> Evaluation:
        return evaluation_of(own_run, progress=lambda done, total: calls.append(done), **options)  # type: ignore[arg-type]

    first = ask()
    assert calls
    calls.clear()
    assert ask() == first
    assert calls == []
    assert ask(split="train").split == "train"
    assert calls
    calls.clear()
    assert ask() == first  # the other split took its place
    assert calls
    calls.clear()
    assert ask(renew=True) == first
    assert calls
    calls.clear()
    assemble(own_run, "raw")
    assert ask().chain != first.chain
    assert calls


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"of": null, "evaluation": {"surprise": 1}}'])
def test_a_damaged_memory_is_made_again(own_run: RunDirectory, text: str) -> None:
    own_run.storage.write_atomic(EVALUATION, text.encode())
    assert evaluation_of(own_run).rows > 0
    assert json.loads(own_run.storage.read_text(EVALUATION))["of"]["split"] == "test"


def test_one_of_an_earlier_version_is_made_again(own_run: RunDirectory) -> None:
    """Its words may mean something else: `product` was the plain product once."""
    first = evaluation_of(own_run)
    kept = json.loads(own_run.storage.read_text(EVALUATION))
    del kept["of"]["version"], kept["evaluation"]["calibration"], kept["evaluation"]["without"]
    kept["evaluation"]["readouts"]["product"] = 0.5
    own_run.storage.write_atomic(EVALUATION, json.dumps(kept).encode())
    assert evaluation_known(own_run, kept["of"]["sha256"]) is None
    assert evaluation_of(own_run) == first


def test_shards_that_have_moved(own_run: RunDirectory, digits: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(digits, tmp_path / "moved")
    path = Path(own_run.uri, "model/config.json")
    about = json.loads(path.read_text())
    about["config"]["data"]["path"] = str(tmp_path / "gone")
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"data\.path = .*gone.*--data"):
        evaluation_of(own_run)
    assert evaluation_of(own_run, data=str(moved)).rows > 0


def test_other_data(classifier: Classifier, digits: Path, tmp_path: Path) -> None:
    other = shutil.copytree(digits, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["class_names"] = [f"digit {name}" for name in manifest["class_names"]]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"--data = .*not those the model was trained on"):
        evaluate(classifier.model, data=other)


def test_changed_shards(classifier: Classifier, digits: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(digits, tmp_path / "changed")
    path = next(path for path in changed.iterdir() if path.name.startswith("test"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(CorruptData, match="shard"):
        evaluate(classifier.model, data=changed)


def test_renewed_chain_settings_reach_the_model(own_run: RunDirectory) -> None:
    chain = own_run.config.chain.model_copy(update={"readout": "last", "start_noises": 2})
    before = model_of(own_run)
    renewed = RunDirectory.create_or_resume(
        own_run.uri, own_run.config.model_copy(update={"chain": chain}), own_run.plan
    )
    after = model_of(renewed)
    assert after.config.chain == chain
    assert after.sha256 == before.sha256
    assert evaluation_of(renewed).predict == "last"


def test_a_run_directory_is_loaded_as_it_is_evaluated(own_run: RunDirectory) -> None:
    """Assembled if it is not yet, and with the chain that its configuration has now."""
    sha256 = model_of(own_run).sha256
    chain = own_run.config.chain.model_copy(update={"readout": "last"})
    config = own_run.config.model_copy(update={"chain": chain})
    RunDirectory.create_or_resume(own_run.uri, config, own_run.plan)
    assert dbtrain.load(own_run.uri).model.config.chain == chain
    shutil.rmtree(Path(own_run.uri, "model"))
    assert dbtrain.load(own_run.uri).model.sha256 == sha256


def test_a_model_folder_is_loaded_as_it_is(own_run: RunDirectory, tmp_path: Path) -> None:
    model_of(own_run)
    alone = Path(own_run.uri, "model").rename(tmp_path / "alone")
    assert dbtrain.load(str(alone)).model.config == own_run.config
    assert not Path(own_run.uri, "model").exists()
