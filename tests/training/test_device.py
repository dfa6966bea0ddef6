from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from dbtrain.errors import UserError
from dbtrain.training.device import inference_device, prepare_device


def test_cpu() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    assert (
        prepare_device("cpu") == inference_device("cpu") == inference_device(torch.device("cpu")) == torch.device("cpu")
    )
    assert torch.are_deterministic_algorithms_enabled() == before


# Pages that a process asks the system for while it "trains": ten rounds of 60 MB, 15,000 pages each, after as many in
# which memory finds its place.
ROUNDS = """
import resource, torch
from dbtrain.training.device import prepare_device
prepare_device("cpu")
for number in range(20):
    if number == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(5_000_000) for _ in range(3)]
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# A process's memory lies somewhere else each time: without `keep_freed_memory` most of them, but not all, take 97,000.
@pytest.mark.parametrize("process", range(3))
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other ways")
def test_what_a_step_frees_is_there_for_the_next_one(process: int) -> None:
    done = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) < 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(UserError, match=r"resources\.device = 'cuda'.*resources\.gpus=0"):
        prepare_device("cuda")
    with pytest.raises(UserError, match="device = 'cuda'"):
        inference_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpu:x"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(UserError, match=r"device = .*cannot be used"):
        inference_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu() -> None:
    try:
        assert prepare_device("cuda").type == "cuda"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
