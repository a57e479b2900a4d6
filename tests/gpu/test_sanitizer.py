"""compute-sanitizer finds no fault in any kernel, and does find those planted in ``faults.cu``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized
from gpu_tools import IS_GPU

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FAULT = 9  # exit status for a fault that a tool has found
SECONDS = 240  # for one run: below the limit of the whole step


def tool_of_cuda(name):
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def under(tool, *command):
    """The command's exit status, and what it and the tool said."""
    sanitizer = [tool_of_cuda("compute-sanitizer"), "--tool", tool, "--error-exitcode", str(FAULT)] if tool else []
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or an overrun lands in the cache's own memory
    run = subprocess.run([*sanitizer, *command], capture_output=True, text=True, timeout=SECONDS, env=environment)
    lines = (run.stdout + run.stderr).splitlines()
    return run.returncode, "\n".join(line for line in lines if "Host Frame" not in line)


@pytest.mark.parametrize("way", sanitized.WAYS)
@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_no_fault(tool, way, kernels):
    if kernels == "native" and way != sanitized.WAYS[0]:
        pytest.skip("only the Triton kernels' launches can be made to go other ways")
    if not IS_GPU and tool != TOOLS[0]:
        pytest.skip("without a GPU there is no sanitizer, and the tools do not differ")
    status, said = under(tool if IS_GPU else None, sys.executable, str(HERE / "sanitized.py"), kernels, way)
    assert status == 0, said[:2000] + "\n...\n" + said[-3000:]
    assert not IS_GPU or "0 errors" in said, said[-500:]  # the tool was there


@pytest.mark.needs_gpu
@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_a_planted_fault(tool, tmp_path):
    faults = tmp_path / "faults"
    subprocess.run([tool_of_cuda("nvcc"), "-O1", "-arch=native", "-o", faults, HERE / "faults.cu"], check=True)
    status, said = under(tool, faults, tool)
    assert status == FAULT, said[-3000:]
    status, said = under(tool, faults)
    assert status == 0 and "0 errors" in said and "done" in said, said[-3000:]
