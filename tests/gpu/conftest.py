"""Tests that say something only on real hardware. Elsewhere they skip, with the reason."""

import pytest
import torch

import brn_kernels as brn


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def triton_backend(gpu):
    with brn.use_backend("triton"):
        yield
