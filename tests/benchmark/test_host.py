"""The host's time, on a device that computes nothing."""

import csv
import os
import shutil
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def run(tmp_path):
    """``brn bench host`` in a process of its own, since the device stays registered."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: `brn bench` measures the host's time")

    def run(**environment):
        command = [sys.executable, "-m", "bench", "host", str(tmp_path / "host.csv"), "--seconds", "0"]
        environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)} | environment
        return subprocess.run(command, env=environment, capture_output=True, text=True), tmp_path / "host.csv"

    return run


def test_every_call_of_ours_and_of_batchnorm_is_timed(run):
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    said, path = run()
    assert said.returncode == 0, said.stderr
    with path.open() as file:
        rows = {(row["what"], row["direction"]): float(row["p50_us"]) for row in csv.DictReader(file)}
    directions = ("forward", "backward", "both")
    whats = ("BatchNorm", "brn_kernels, in Python", "brn_kernels")
    assert list(rows) == [(what, direction) for what in whats for direction in directions]
    assert all(time > 0 for time in rows.values())


def test_without_a_compiler_one_line_says_so(run):
    said, path = run(CXX="no-such-compiler")
    assert said.returncode == 2 and "C++ compiler" in said.stderr and "Traceback" not in said.stderr
    assert not path.exists()
