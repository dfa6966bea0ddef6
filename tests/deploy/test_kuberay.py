"""The files for KubeRay against its schemas, and against what its operator refuses beyond them."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from deployment import manifest, text
from jsonschema import Draft202012Validator
from typer.main import get_command

import dbtrain
from dbtrain.cli.main import app

SCHEMAS = json.loads((Path(__file__).parent / "schemas/kuberay.json").read_text())
CLUSTER, JOB = "cluster/kuberay/raycluster.yaml", "launch/rayjob.yaml"


def errors(loaded: dict[str, Any]) -> list[str]:
    """What the API server would refuse."""
    validator = Draft202012Validator({**SCHEMAS[loaded["kind"]], "$defs": SCHEMAS["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(loaded)]


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> list[dict[str, Any]]:
    """The pods' specifications, the head's first."""
    spec = cluster_spec(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", [CLUSTER, JOB])
def test_schema(name: str) -> None:
    loaded = manifest(name)
    assert loaded["apiVersion"] == "ray.io/v1"
    assert errors(loaded) == []


def test_the_schema_finds_what_is_wrong() -> None:
    def broken(*path: str | int, value: object) -> list[str]:
        loaded = copy.deepcopy(manifest(JOB))
        node: Any = loaded["spec"]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return errors(loaded)

    cluster = "rayClusterSpec"
    assert "authOption" in broken(cluster, "authOption", value={"mode": "token"})[0]
    assert "'off' is not one of" in broken(cluster, "authOptions", "mode", value="off")[0]
    assert "'3' is not of type 'integer'" in broken(cluster, "workerGroupSpecs", 0, "replicas", value="3")[0]
    container = (cluster, "headGroupSpec", "template", "spec", "containers", 0)
    assert "volumeMount'" in broken(*container, "volumeMount", value=[])[0]
    assert "'mountPath' is a required property" in broken(*container, "volumeMounts", value=[{"name": "runs"}])[0]


@pytest.mark.parametrize(("name", "longest"), [(CLUSTER, 53), (JOB, 47)])
def test_what_the_operator_checks(name: str, longest: int) -> None:
    loaded = manifest(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", loaded["metadata"]["name"])
    assert len(loaded["metadata"]["name"]) <= longest
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        # Without autoscaling both limits have to be there.
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        # Given twice, they are refused.
        assert not {"num-gpus", "memory"} & group["rayStartParams"].keys()


@pytest.mark.parametrize("name", [CLUSTER, JOB])
def test_pods(name: str) -> None:
    head, *workers = pods(name)
    claim = manifest("cluster/kuberay/runs-claim.yaml")["metadata"]["name"]
    for pod in (head, *workers):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert len(mounts) == len(volumes)
        assert mounts["/runs"]["persistentVolumeClaim"] == {"claimName": claim}
        # A pod that may take more than it asks for is the first to be thrown out.
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["image"].endswith(f"/dbtrain:{dbtrain.__version__}")
        # KubeRay makes both probes, for the version of Ray that the image has.
        assert not {"readinessProbe", "livenessProbe"} & container.keys()
        assert f"--uid {pod['securityContext']['runAsUser']} " in text("cluster/Dockerfile")
    assert [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in workers] == ["1"]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("name", [CLUSTER, JOB])
def test_the_version_of_ray_is_the_image_s(name: str) -> None:
    assert f"\nray=={cluster_spec(name)['rayVersion']}\n" in text("requirements.txt")


def test_the_job_brings_the_same_cluster() -> None:
    job, cluster = cluster_spec(JOB), cluster_spec(CLUSTER)
    pod = job["headGroupSpec"]["template"]["spec"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "config"]
    (container,) = pod["containers"]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "config"]
    assert job == cluster


def test_the_job_starts_a_run() -> None:
    spec = manifest(JOB)["spec"]
    # Retries need a new cluster each, and a cluster that is kept is not what a job is for.
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    program, verb, *arguments = shlex.split(spec["entrypoint"])
    assert (program, verb) == ("dbtrain", "train")
    command: Any = get_command(app)
    given = command.commands["train"].make_context("train", arguments).params
    assert given["run"].startswith("/runs/")
    head = pods(JOB)[0]
    (mount,) = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "config"]
    assert str(given["config"]) == f"{mount['mountPath']}/config.yaml"
    assert f"kubectl create configmap {head['volumes'][1]['configMap']['name']} --from-file=config.yaml=" in text(JOB)


def test_the_claim_of_the_runs() -> None:
    claim = manifest("cluster/kuberay/runs-claim.yaml")
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    # Pods may also have volumes made for them, so that the schema of a pod has that of a claim in it.
    pod = manifest(CLUSTER)
    pod["spec"]["headGroupSpec"]["template"]["spec"]["volumes"] = [
        {"name": "runs", "ephemeral": {"volumeClaimTemplate": {"spec": claim["spec"]}}}
    ]
    assert errors(pod) == []
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim.keys() == {"apiVersion", "kind", "metadata", "spec"}
    claim["spec"]["storageClass"] = "nfs"
    assert "storageClass" in errors(pod)[0]
