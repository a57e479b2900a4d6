"""compute-sanitizer finds no fault in any kernel."""

import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import torch, brn_kernels as brn
brn.use_backend("triton")
torch.manual_seed(0)
for shape in [(5, 19), (3, 24, 9, 7), (8, 72, 7, 7), (2, 3, 65, 33)]:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for channels_last in (False, True):
            for activation, residual in ((None, False), ("relu", True), ("silu", False)):
                make = brn.BatchRenorm1d if len(shape) == 2 else brn.BatchRenorm2d
                layer = make(shape[1], schedule=brn.ClipSchedule.constant(1.1, 0.1), activation=activation).cuda()
                layer = layer.double() if dtype == torch.float64 else layer
                x = torch.randn(shape, device="cuda", dtype=dtype)
                if channels_last and x.dim() == 4:
                    x = x.to(memory_format=torch.channels_last)
                extra = torch.randn_like(x).requires_grad_() if residual else None
                for _ in range(2):
                    y = layer(x.requires_grad_(), extra)
                    y.backward(torch.randn_like(y))
torch.cuda.synchronize()
"""
SLABS = """
from brn_kernels.backends.triton import config
config.slab_of = lambda *_: 2
"""


@pytest.mark.parametrize("slabs", [False, True], ids=["two launches", "slabs"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool, slabs):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (SLABS if slabs else "") + SCRIPT
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
