"""Tests that say something only on real hardware. Elsewhere they skip, with the reason."""

import pytest
import torch

import brn_kernels as brn


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(params=["triton", "native"])
def kernels(request, gpu):
    """The backends with kernels for GPUs, in turn."""
    try:
        brn.backends.resolve(request.param, "cuda")
    except RuntimeError as error:
        pytest.skip(str(error))
    with brn.use_backend(request.param):
        yield request.param
