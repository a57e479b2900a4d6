"""The common suite on the GPU, as one test, so that ``tests/gpu`` is complete."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.needs_gpu
def test_common_suite_on_cuda(request):
    if request.config.getoption("--device").startswith("cuda"):
        pytest.skip("this run is that suite")
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "--device", "cuda", "-q", str(tests), "--ignore", str(tests / "gpu")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=3000, cwd=tests.parent)
    assert run.returncode == 0, run.stdout[-5000:]
