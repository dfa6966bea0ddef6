from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dbtrain.config import Section
from dbtrain.config_file import differences, load_config, parse_config
from dbtrain.errors import UserError
from dbtrain.resources_config import ResourcesConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def minimal() -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {
            "image_size": 8,
            "channels": 1,
            "num_classes": 10,
            "patch_size": 4,
            "depth": 6,
            "width": 32,
            "heads": 4,
            "mlp_width": 64,
        },
        "training": {"steps": 100},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(minimal()))
    return path


def message(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert "Error" not in text
    assert "pydantic" not in text
    return text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_config(path).name


def test_defaults_are_those_of_the_paper_where_it_names_them() -> None:
    config = parse_config(minimal())
    assert (config.noise.p_mean, config.noise.p_std, config.noise.sigma_data) == (-1.2, 1.2, 0.5)
    assert (config.noise.sigma_min, config.noise.sigma_max) == (0.002, 80.0)
    assert (config.blocks.count, config.blocks.overlap) == (3, 0.05)
    assert config.blocks.partition.kind == "equal_probability"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dpeth=3", "model.dpeth: is not a known key (did you mean 'depth'?)"),
        ("optimizer.lr=1", "optimizer: is not a known key (did you mean 'optimiser'?)"),
        (
            "data.augment.randaugment.operatoins=1",
            "data.augment.randaugment.operatoins: is not a known key (did you mean 'operations'?)",
        ),
        ("codebook.zzz=1", "codebook.zzz: is not a known key (known here: scale)"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(file: Path, override: str, expected: str) -> None:
    assert message(file, override) == expected


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # wrong type
        ("model.depth=abc", ["model.depth", "'abc'", "valid integer"]),
        ("model.depth=3.5", ["model.depth", "3.5", "integer"]),
        ("training.steps=", ["training.steps", "valid integer"]),
        ("name=123", ["name", "123", "valid string"]),
        ("training=3", ["training", "3", "section", "steps"]),
        ("data.augment.randaugment=5", ["data.augment.randaugment", "5", "section", "operations"]),
        ("model.family=gan", ["model.family", "'gan'", "vit", "dit", "causal_lm"]),
        ("blocks.split=[2,2,a]", ["blocks.split.2", "'a'", "integer"]),
        # wrong range
        ("model.depth=-1", ["model.depth", "-1", "greater than or equal to 1"]),
        ("model.num_classes=1", ["model.num_classes", "1", "greater than or equal to 2"]),
        ("model.dropout=1.0", ["model.dropout", "1.0", "less than 1"]),
        ("noise.p_std=.nan", ["noise.p_std", "nan", "finite"]),
        ("noise.p_mean=.inf", ["noise.p_mean", "inf", "finite"]),
        ("seed=-1", ["seed", "-1"]),
        ("name=a/b", ["name", "'a/b'", "pattern"]),
        ("optimiser.betas=[0.9,1.0]", ["optimiser.betas.1", "1.0", "less than 1"]),
        # parts that do not fit together
        ("blocks.count=9", ["blocks.count 9", "6 layers of model.depth"]),
        ("model.patch_size=3", ["model", "patch_size 3", "does not divide image_size 8"]),
        ("model.heads=5", ["model", "heads 5", "does not divide width 32"]),
        ("blocks.split=[2,2,3]", ["blocks.split [2, 2, 3]", "3 blocks", "add up to 6"]),
        ("training.accumulate=3", ["training", "accumulate 3", "batch_size 128"]),
        ("noise.sigma_min=100", ["noise", "sigma_min 100.0", "below sigma_max 80.0"]),
        ("resources={replicas: 2, gpus: 0.5}", ["resources", "gpus 0.5", "replicas", "whole GPU"]),
        ("data.cache=s3://bucket/cache", ["data.cache", "'s3://bucket/cache'", "folder of this machine"]),
        ("data.cache=''", ["data.cache", "''", "at least 1 character"]),
        ("chain.steps=2", ["chain.steps 2", "3 blocks"]),
        ("chain.readout=best", ["chain", "readout 'best'", "first_mean"]),
        ("schedule.warmup_steps=101", ["schedule.warmup_steps 101", "training.steps 100"]),
        ("schedule.min_lr=1", ["schedule.min_lr 1.0", "optimiser.lr 0.001"]),
        ("blocks.partition.kind=explicit", ["blocks.partition", "boundaries", "'explicit'"]),
        (
            "blocks.partition={kind: explicit, boundaries: [80, 1, 2, 0.002]}",
            ["blocks.partition", "[80.0, 1.0, 2.0, 0.002]", "fall strictly"],
        ),
        (
            "blocks.partition={kind: explicit, boundaries: [80, 1, 0.002]}",
            ["blocks.partition.boundaries [80.0, 1.0, 0.002]", "needs 4 values"],
        ),
        (
            "blocks.partition={kind: explicit, boundaries: [70, 1, 0.5, 0.002]}",
            ["blocks.partition.boundaries [70.0, 1.0, 0.5, 0.002]", "noise.sigma_max 80.0"],
        ),
    ],
)
def test_a_wrong_value_names_field_value_and_mend(file: Path, override: str, parts: list[str]) -> None:
    text = message(file, override)
    assert text.startswith(parts[0])
    for part in parts:
        assert part in text


def test_a_misspelt_required_key_is_not_reported_as_missing(tmp_path: Path) -> None:
    raw = minimal()
    raw["trainign"] = raw.pop("training")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert message(path) == "trainign: is not a known key (did you mean 'training'?)"


def test_a_missing_field_says_what_to_add(file: Path) -> None:
    assert message(file, "model={}").startswith("model.depth: is required and was not given (add model.")


@pytest.mark.parametrize("text", ["foo", "=3", "a..b=3", ".a=3", "a.=3", ".=3", ""])
def test_an_override_has_to_be_a_dotted_field_and_a_value(file: Path, text: str) -> None:
    assert message(file, text).startswith(f"--set = {text!r}: is not of the form section.field=value")


def test_an_override_cannot_go_below_a_value(file: Path) -> None:
    assert "steps is a value, not a section" in message(file, "training.steps.x=3")


@pytest.mark.parametrize("value", ["[", "{a", "2026-99-99", "!!int x"])
def test_an_override_that_is_not_yaml(file: Path, value: str) -> None:
    assert message(file, f"name={value}") == f"--set = 'name={value}': the value is not YAML"


def test_overrides_apply_in_order_and_make_sections(file: Path) -> None:
    config = load_config(
        file,
        [
            "optimiser.lr=1e-4",
            "blocks.split=[3, 2, 1]",
            "data.augment.randaugment.magnitude=5",
            "optimiser.clip_norm=null",
            "name=first=1",
            "name=second",
        ],
    )
    assert config.optimiser.lr == 1e-4
    assert config.optimiser.clip_norm is None
    assert config.blocks.split == (3, 2, 1)
    assert config.data.augment.randaugment is not None
    assert config.data.augment.randaugment.magnitude == 5.0
    assert config.name == "second"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"- a\n- b\n", "holds a list, not sections"),
        (b"model: [1\n", "is not YAML"),
        (b"model: 2026-99-99\n", "is not YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"? {a: b}\n: 1\n", "is not YAML"),
        (b"3: 1\n", "3: is not a known key"),
        (b'"a\\nb": 1\n', "a b: is not a known key"),
    ],
)
def test_a_file_that_holds_no_configuration(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert expected in message(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    expected = f"CONFIG = '{tmp_path / 'no.yaml'}': no such configuration file (give the YAML file of a run)"
    assert message(tmp_path / "no.yaml") == expected
    assert "cannot be read" in message(tmp_path)


def test_a_user_error_crosses_processes() -> None:
    error = UserError("is wrong", field="a.b", value=3, mend="mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (UserError, "a.b = 3: is wrong (mend it)")


sections = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "noise": st.fixed_dictionaries(
            {},
            optional={
                "p_mean": st.floats(-9, 9),
                "p_std": st.floats(1e-3, 9),
                "sigma_data": st.floats(1e-9, 9),
            },
        ),
        "optimiser": st.fixed_dictionaries(
            {}, optional={"lr": st.floats(1e-12, 10), "clip_norm": st.none() | st.floats(1e-3, 100)}
        ),
        "data": st.fixed_dictionaries({}, optional={"path": st.none() | st.text(max_size=9)}),
        "blocks": st.sampled_from(
            [
                {"count": 6},
                {"count": 2, "split": [5, 1]},
                {"count": 2, "partition": {"kind": "explicit", "boundaries": [80, 1 / 3, 0.002]}},
            ]
        ),
    },
)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(extra=sections)
def test_the_resolved_copy_reads_back_equal(extra: dict[str, Any]) -> None:
    config = parse_config({**minimal(), **extra})
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert again.digest() == config.digest()


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "data.path=/elsewhere",
        "data.path=s3://bucket/shards",
        "data.cache=/scratch",
        "checkpoints.every=7",
        "checkpoints.keep=9",
        "logging.every=3",
        "chain.start_noises=2",
        "chain.bridge=argmax",
        "resources.cpus=4",
        "resources.workers=1",
        "resources.max_restarts=0",
        "resources.start_timeout=9",
        "resources.device=cpu",
    ],
)
def test_placement_and_cadence_do_not_change_the_identity(file: Path, override: str) -> None:
    changed = load_config(file, [override])
    assert changed != load_config(file)
    assert changed.digest() == load_config(file).digest()


@pytest.mark.parametrize(
    "override",
    [
        "resources.threads=2",
        "resources.gpus=0.5",  # auto then means cuda
        "resources.device=cuda",
        "seed=1",
        "training.steps=101",
        "training.accumulate=2",
        "blocks.overlap=0.1",
        "blocks.count=2",
        "noise.weight=edm",
        "codebook.scale=2",
        "data.source=photos",
        "data.augment.flip=true",
        "ema.half_life=100",
        "optimiser.kind=adafactor",
        "model.dropout=0.1",
    ],
)
def test_what_changes_the_trained_bytes_changes_the_identity(file: Path, override: str) -> None:
    ours, theirs = load_config(file), load_config(file, [override])
    assert ours.digest() != theirs.digest()
    lines = list(differences(ours.identity(), theirs.identity()))
    field = "resources.device" if override.startswith("resources.gpus") else override.split("=")[0]
    assert len(lines) == 1
    assert lines[0].startswith(f"{field}: ")


def test_folders_become_absolute_and_uris_stay(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = load_config(file, ["data.path=shards", "data.cache=copies"]).located().data
    assert (here.path, here.cache) == (str(tmp_path / "shards"), str(tmp_path / "copies"))
    assert (here.shards, here.cache_folder) == (tmp_path / "shards", tmp_path / "copies")
    named = load_config(file, [f"data.path={(tmp_path / 'two words').as_uri()}"]).located().data
    assert (named.path, named.cached) == (str(tmp_path / "two words"), False)
    remote = load_config(file, ["data.path=s3://bucket/shards?region=eu"]).located().data
    # Every machine has its own idea of the user's cache folder.
    assert (remote.path, remote.cache, remote.cached) == ("s3://bucket/shards?region=eu", None, True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert remote.cache_folder == tmp_path / "home" / "dbtrain" / "shards"


def test_differences_lists_leaves_with_both_values() -> None:
    ours = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": None, "f": {"g": 1}}
    theirs = {"a": 1, "b": {"c": 3, "d": [1, 3]}, "e": {"x": 1}, "h": 0}
    assert list(differences(ours, theirs)) == [
        "b.c: 2 -> 3",
        "b.d: [1, 2] -> [1, 3]",
        "e: None -> {'x': 1}",
        "f: {'g': 1} -> None",
        "h: None -> 0",
    ]
    assert list(differences(ours, ours)) == []


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        parse_config(minimal()).seed = 4  # type: ignore[misc]


def test_every_field_says_what_it_is() -> None:
    undocumented = [
        f"{section.__name__}.{name}"
        for section in Section.__subclasses__()
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus": 1.5}, "gpus 1.5 has to be a whole number"),
        ({"custom": {"GPU": 1}}, "Ray's own name"),
        ({"custom": {"node:10.0.0.1": 1}}, "Ray's own name"),
        ({"shard": True}, "shard needs replicas above 1"),
    ],
)
def test_resources_that_ray_would_refuse(resources: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResourcesConfig.model_validate(resources)
