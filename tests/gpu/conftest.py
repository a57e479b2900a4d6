"""Tests of what only real hardware can show.

Where there is no GPU, those marked ``needs_gpu`` skip, and the others run on the CPU, interpreted and small, with
stand-ins for streams and graphs (``gpu_tools``): so nothing but the GPU itself is tried for the first time on a GPU.
"""

import pytest
from gpu_tools import DEVICE, IS_GPU

import brn_kernels as brn


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def gpu(request):
    if request.node.get_closest_marker("needs_gpu") and not IS_GPU:
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(params=["triton", "native"])
def kernels(request, gpu):
    """The backends with kernels for GPUs, in turn."""
    try:
        brn.backends.resolve(request.param, DEVICE.type)
    except RuntimeError as error:
        pytest.skip(str(error))
    with brn.use_backend(request.param):
        yield request.param
