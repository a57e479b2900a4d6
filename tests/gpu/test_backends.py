"""Both backends with kernels for GPUs are there: a test that skips for want of one shows nothing."""

import pytest
import torch

from brn_kernels import build
from brn_kernels.backends import native, triton


@pytest.mark.needs_gpu
def test_triton_runs_here():
    assert triton.unusable("cuda") is None


def test_the_library_for_gpus_loads_where_it_was_built():
    """Loading failed on the first GPU, and every test of it was skipped."""
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    built = build.find()
    if isinstance(built, str) or built.cuda is None:
        pytest.skip("no library for GPUs was built")
    assert native.unusable("cuda") is None
