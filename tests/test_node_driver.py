"""What C++ launches by the CUDA driver, beside what Triton's own launcher does, parameter by parameter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brn_kernels import node

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton compiles its launcher with gcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and its driver: tests/gpu launches there")
def test_launches_are_those_of_tritons_launcher(tmp_path):
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", HERE / "cuda_driver.c", "-o", driver], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path]),
    }  # fmt: skip
    script = [sys.executable, HERE / "launches_alike.py"]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and run.stdout.endswith(": alike\n"), run.stdout + run.stderr
