"""compute-sanitizer finds no fault in any kernel."""

import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch, brn_kernels as brn
brn.use_backend(sys.argv[1])
torch.manual_seed(0)
for shape in [(8, 72, 7, 7), (5, 24, 16, 12)]:  # rows that are not aligned in the contiguous layout, and that are
    for dtype, memory_format in ((torch.bfloat16, torch.channels_last), (torch.float32, torch.contiguous_format)):
        for activation, residual in ((None, False), ("relu", True)):
            layer = brn.BatchRenorm2d(shape[1], schedule=brn.ClipSchedule.constant(1.1, 0.1), activation=activation)
            layer = layer.cuda()
            x = torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format)
            extra = torch.randn_like(x).requires_grad_() if residual else None
            for _ in range(2):
                y = layer(x.requires_grad_(), extra)
                y.backward(torch.randn_like(y))
                assert y.isfinite().all() and x.grad.isfinite().all()
"""
# initcheck takes what another program of the same launch has just written for uninitialized: partial results are read
# so. Memory that is all NaN beforehand is initialized, and what nobody writes then shows in the results.
FILLED = """
import torch
empty = torch.empty
torch.empty = lambda *a, **k: (lambda t: t.fill_(float("nan") if t.is_floating_point() else 1))(empty(*a, **k))
"""
VARIANTS = {
    "two launches": "from brn_kernels.backends.triton import config; config.ITEMS_WITHOUT_SPLIT = 0\n",
    "one launch": "from brn_kernels.backends.triton import config; config.ITEMS_WITHOUT_SPLIT = 10**9\n",
}


@pytest.mark.parametrize("variant", ["two launches", "one launch"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool, variant, kernels):
    if kernels == "native" and variant == "one launch":
        pytest.skip("only the Triton kernels have this")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    script = VARIANTS[variant] + (FILLED if tool == "initcheck" else "") + SCRIPT
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script, kernels]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or an overrun lands in the cache's own memory
    run = subprocess.run(command, capture_output=True, text=True, timeout=560, env=environment)
    lines = (run.stdout + run.stderr).splitlines()
    assert run.returncode == 0, "\n".join(line for line in lines if "Host Frame" not in line)[:5000]
    assert "0 errors" in run.stdout, run.stdout[-500:]
