"""Statistics of several processes: real ones, started by torchrun, compared with one that has the whole batch."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import brn_kernels as brn

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without Gloo")


def run(checks, backend, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(WORKER), *checks, backend],
        capture_output=True, text=True, timeout=480, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def pass_(checks, backend, processes):
    """One after the other in the same processes: to start them takes longer than most checks."""
    done = run(checks, backend, processes)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for check in checks:
        assert done.stdout.count(f"{check}: passed") == processes, done.stdout


@pytest.fixture
def backend_of_cpus(backend, device):
    if backend == "triton" and device.type != "cpu":
        pytest.skip("these processes compute on CPUs, where the interpreter is a matter of the suite for CPUs")
    return backend


def test_two_processes_equal_one_with_the_whole_batch(backend_of_cpus):
    checks = ["recomputing", "automatic"]
    if os.environ.get("BRN_KERNELS_SANITIZE") != "1":  # there the loops are sanitized by the tests of one process
        checks.append("oracle")
    pass_(checks, backend_of_cpus, 2)


@pytest.mark.parametrize("checks, backend", [(["oracle", "groups"], "auto"), (["oracle"], "reference")], ids=str)
def test_four_processes_equal_one_and_may_form_groups(checks, backend):
    pass_(checks, backend, 4)


@pytest.mark.parametrize("checks", [["ddp", "fsdp", "checkpointing"], ["compiled"]], ids=" ".join)
def test_training_equals_one_process(checks):
    pass_(checks, "auto", 2)


def test_fused_networks_and_monitors():
    pass_(["fused", "monitored"], "reference", 2)


@pytest.mark.parametrize("check", ["dead", "mismatch"])
def test_the_others_fail_within_the_timeout(check):
    done = run([check], "auto", 2)
    assert "the others learnt" in done.stdout, done.stdout + done.stderr[-3000:]


def test_without_other_processes_nothing_changes(backend, device):
    torch.manual_seed(0)
    alone, synced = brn.BatchRenorm2d(3, device=device), brn.convert_sync(brn.BatchRenorm2d(3, device=device))
    x = torch.randn(4, 3, 2, 2, device=device)
    assert torch.equal(alone(x), synced(x)) and torch.equal(alone.running_var, synced.running_var)


def test_the_group_survives_copies_and_is_shown():
    layer = pickle.loads(pickle.dumps(brn.convert_sync(nn.Sequential(brn.BatchRenorm1d(3)))))[0]
    assert layer.process_group == "default" and "process_group='default'" in repr(layer)


def test_sync_batch_norm_converts_with_its_group_and_back():
    layer = brn.convert_batchnorm(nn.SyncBatchNorm(3))
    assert layer.process_group == "default"
    back = brn.revert_to_batchnorm(layer)
    assert type(back) is nn.SyncBatchNorm and back.process_group is None
    assert brn.convert_batchnorm(nn.BatchNorm2d(3)).process_group is None


def test_a_torch_without_distributed_still_imports_and_trains():
    """Some builds have none of its names."""
    script = """
import torch.distributed as dist
dist.is_available = lambda: False
for name in ("all_gather_single", "all_gather_into_tensor", "ProcessGroup", "group"):
    vars(dist).pop(name, None)
import torch, brn_kernels as brn
brn.convert_sync(brn.BatchRenorm1d(3))(torch.randn(4, 3))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_something_that_is_no_group_is_refused():
    with pytest.raises(ValueError, match="process_group must be"):
        brn.BatchRenorm2d(3, process_group=object())
