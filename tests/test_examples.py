"""Each script in examples/ runs for a few steps, as a user would run it."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"

HIDE_BRN_KERNELS = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "brn_kernels":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
# timm and Lightning import torchvision, whose import lacks operators beside a build of torch that it does not fit.
BESIDE_ANY_TORCHVISION = """
import contextlib
try:
    import torchvision
except (ImportError, RuntimeError):
    from torch import library
    operators = library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.fixture
def run(tmp_path):
    """``run(*arguments, status=0, first="")``: Python with these arguments, after the code ``first``; its output."""

    def run(*arguments, status=0, first=""):
        (tmp_path / "sitecustomize.py").write_text(first)
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
        assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run


def train(*options):
    return EXAMPLES / "train.py", "--device", "cpu", *options


def torchrun(*options):
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *train(*options)


def assert_learned(output, least):
    """The loss fell by a third, and the test accuracy, in percent, is at least ``least`` (chance is 12.5)."""
    losses = [float(loss) for loss in re.findall(r"^.*step .*loss (\S+)$", output, re.MULTILINE)]
    assert len(losses) >= 2 and losses[-1] < losses[0] * 2 / 3, output
    (accuracy,) = re.findall(r"^test accuracy (\S+) %", output, re.MULTILINE)
    assert float(accuracy) >= least, output


def test_plain(run):
    assert_learned(run(*train("--steps", 200)), least=60)


def test_norms_are_equal_with_closed_limits(run):
    options = ("--steps", 20, "--log-every", 1)
    outputs = run(*train("--norm", "batchnorm", *options)), run(*train("--schedule", "batchnorm", *options))
    batchnorm, batchrenorm = ([float(loss) for loss in re.findall(r"loss (\S+)", output)] for output in outputs)
    assert len(batchnorm) == 20
    torch.testing.assert_close(batchrenorm, batchnorm, rtol=0, atol=1e-3)  # rounding, amplified by 20 steps


def test_without_brn_kernels(run):
    output = run(*train("--steps", 3), status=2, first=HIDE_BRN_KERNELS)
    assert "--norm batchrenorm needs brn_kernels" in output and "Traceback" not in output
    assert_learned(run(*train("--steps", 200, "--norm", "batchnorm"), first=HIDE_BRN_KERNELS), least=60)


def test_resumed_training_gives_the_same_weights(run, tmp_path):
    options = ("--steps", 30, "--checkpoint")
    run(*train(*options, tmp_path / "whole.pt"))
    output = run(*train(*options, tmp_path / "parts.pt", "--stop-at", 15))
    assert "step   15/30" in output and "step   30/30" not in output
    assert "resumed at step 15" in run(*train(*options, tmp_path / "parts.pt"))
    whole, parts = (torch.load(tmp_path / name)["model"] for name in ("whole.pt", "parts.pt"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_exported_program_is_plain_batchnorm(run, tmp_path):
    output = run(*train("--steps", 30, "--amp", "bf16", "--export", tmp_path / "model.pt2"))
    assert "predictions are equal" in output
    program = torch.export.load(tmp_path / "model.pt2")
    assert "batch_norm" in str(program.graph)
    assert not any("clipped" in name for name, _ in program.named_buffers())  # the layers' own buffer
    assert program.module()(torch.randn(3, 1, 16, 16)).shape == (3, 8)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_compiled(run):
    output = run(*train("--compile", "--steps", 200, "--r-max", 2, "--d-max", 1))
    assert_learned(output, least=60)


def test_two_processes(run):
    own, shared = run(*torchrun("--steps", 200)), run(*torchrun("--steps", 200, "--sync"))
    for output in (own, shared):
        assert "processes: 2" in output
        assert_learned(output, least=60)
    first_own, first_shared = (re.search(r"loss (\S+)", output)[1] for output in (own, shared))
    assert first_own != first_shared  # same weights, same images, other statistics


def test_batchnorm_with_shared_statistics_is_refused_on_cpus(run):
    assert "needs GPUs" in run(*train("--norm", "batchnorm", "--sync"), status=2)


@pytest.mark.skipif(find_spec("pytorch_lightning") is None, reason="pytorch-lightning is not installed")
class TestLightning:
    script = EXAMPLES / "train_lightning.py", "--accelerator", "cpu", "--steps", 200

    def test_learns(self, run):
        assert_learned(run(*self.script, first=BESIDE_ANY_TORCHVISION), least=60)

    def test_two_processes_with_shared_statistics(self, run):
        assert_learned(run(*self.script, "--devices", 2, "--sync", first=BESIDE_ANY_TORCHVISION), least=60)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timm(run):
    script = EXAMPLES / "train_timm.py", "--device", "cpu"
    output = run(*script, "--epochs", 2, "--images", 1024, first=BESIDE_ANY_TORCHVISION)
    assert_learned(output, least=60)
    assert "averaged weights, with statistics of their own" in output
