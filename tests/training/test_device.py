from __future__ import annotations

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
