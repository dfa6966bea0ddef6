"""The container file, as far as it can be judged without building it."""

from __future__ import annotations

import re
import shlex

from deployment import ROOT, complaints, files_to_install, pyproject, text

DOCKERFILE = "cluster/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Instructions and their arguments, lines that go on joined."""
    body = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text(DOCKERFILE)))
    return [(line.split()[0], line.partition(" ")[2]) for line in body.splitlines() if line.strip()]


def arguments_of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def test_hadolint() -> None:
    assert complaints("hadolint", DOCKERFILE) == ""


def test_base_is_cuda_of_one_version() -> None:
    (base,) = arguments_of("FROM")
    defaults = dict(argument.split("=") for argument in arguments_of("ARG"))
    assert base.replace("${CUDA}", defaults["CUDA"]) == "nvidia/cuda:13.0.0-base-ubuntu24.04"
    # The wheels that the tests run with, in their build for CUDA.
    assert f"\nTORCH ?= {defaults['TORCH']}\n" in text("Makefile")


def test_what_is_copied_is_there_and_can_be_installed() -> None:
    copied = [word for argument in arguments_of("COPY") for word in shlex.split(argument)[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert set(copied) == files_to_install() | {"requirements.txt"}
    allowed = [line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")]
    assert sorted(allowed) == sorted(copied)


def test_the_extras_exist() -> None:
    (extras,) = re.findall(r"'\.\[(.*)\]'", text(DOCKERFILE))
    assert set(extras.split(",")) <= pyproject()["project"]["optional-dependencies"].keys()


def test_it_does_not_run_as_root() -> None:
    (user,) = arguments_of("USER")
    assert f"useradd --create-home --uid {user} " in text(DOCKERFILE)


def test_what_kuberay_and_ray_call_is_installed() -> None:
    install = next(line for line in arguments_of("RUN") if "apt-get install" in line)
    assert {"wget", "procps", "gcc", "python3-dev"} <= set(install.split())
