"""What each process of ``test_distributed.py`` runs: ``torchrun distributed_worker.py CHECK BACKEND``.

Every check raises where it fails, so that torchrun exits with an error.
"""

import copy
import datetime
import os
import re
import signal
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from oracle import Oracle
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn

TIMEOUT_S = 5
SIZES = ([3, 2, 1, 4], [3, 0, 2, 1])  # samples of each process: uneven, and one with none
CHANNELS = 5
LIMITS = brn.ClipSchedule.constant(1.2, 0.3)  # clip some channels
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def part(values, sizes):
    """This process's samples."""
    first = sum(sizes[: dist.get_rank()])
    return values[first : first + sizes[dist.get_rank()]]


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def summed(value):
    value = value.double().clone()
    dist.all_reduce(value)
    return value


def oracle():
    for sizes in (sizes[: dist.get_world_size()] for sizes in SIZES):
        for dtype in TOLERANCE:
            for activation, with_residual, masked in (
                (None, False, False), ("relu", True, False), ("silu", True, False), ("hardswish", False, True),
            ):  # fmt: skip
                equals_the_oracle(sizes, dtype, activation, with_residual, masked)


def equals_the_oracle(sizes, dtype, activation, with_residual, masked):
    """Three steps of the processes against one process with the whole batch, in float64."""
    layer = brn.BatchRenorm2d(
        CHANNELS, momentum=0.2, schedule=LIMITS, activation=activation, process_group=dist.group.WORLD
    ).to(dtype)
    weight, bias = (torch.linspace(*ends, CHANNELS, dtype=torch.float64) for ends in ((0.5, 1.5), (-1, 1)))
    truth = Oracle(CHANNELS, weight.requires_grad_(), bias.requires_grad_(), 0.2, 1e-5, activation, 1.2, 0.3)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    shape = (sum(sizes), CHANNELS, 4, 3)

    def close(ours, theirs, name):
        torch.testing.assert_close(
            ours.detach().double(), theirs.detach(), rtol=0, atol=TOLERANCE[dtype] * 10, msg=lambda m: f"{name}: {m}"
        )

    for step in range(3):
        x64, residual64, dy64 = (normal(*shape, seed=3 * step + k, dtype=dtype).double() for k in range(3))
        x64 = (x64 * 1.5 + step * 0.5).to(dtype).double().requires_grad_()
        residual64.requires_grad_()
        mask = normal(shape[0], 1, 4, 3, seed=step) > -0.5 if masked else None
        weight.grad = bias.grad = layer.weight.grad = layer.bias.grad = None
        y64 = truth(x64, residual64 if with_residual else None, mask)
        y64.backward(dy64)
        x, residual = (part(t.detach(), sizes).to(dtype).requires_grad_() for t in (x64, residual64))
        y = layer(x, residual if with_residual else None, None if mask is None else part(mask, sizes))
        y.backward(part(dy64, sizes).to(dtype))
        close(y, part(y64, sizes), "y")
        close(x.grad, part(x64.grad, sizes), "dx")
        if with_residual:
            close(residual.grad, part(residual64.grad, sizes), "dresidual")
        close(summed(layer.weight.grad), weight.grad, "dweight")
        close(summed(layer.bias.grad), bias.grad, "dbias")
        close(layer.running_mean, truth.running_mean, "running_mean")
        close(layer.running_var, truth.running_var, "running_var")
        assert layer.clipped.equal(truth.clipped) and layer.num_batches_tracked == step + 1


def automatic():
    """Limits that follow the statistics of all processes: equal on all of them, and those of the whole batch."""
    for step_sizes in SIZES:
        sizes = step_sizes[: dist.get_world_size()]
        alone = brn.BatchRenorm1d(CHANNELS, momentum=0.2, schedule=brn.ClipSchedule.auto()).double()
        ours = brn.convert_sync(copy.deepcopy(alone))
        for step in range(14):
            x = normal(sum(sizes), CHANNELS, 6, seed=step) * 2 + 1
            expected, y = alone(x), ours(part(x, sizes))
            torch.testing.assert_close(y, part(expected, sizes), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.auto_state, alone.auto_state, rtol=1e-9, atol=1e-9)
        mean = summed(ours.auto_state) / dist.get_world_size()
        assert torch.equal(mean, ours.auto_state) and ours.auto_limits()[1].min() > 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False)
        self.norm1 = brn.BatchRenorm2d(CHANNELS, momentum=0.2, schedule=LIMITS, activation="relu")
        self.norm2 = brn.BatchRenorm2d(CHANNELS, momentum=0.2, schedule=LIMITS)
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, x):
        h = self.norm1(self.conv(x))
        return self.head(self.norm2(h * 1.5, residual=h).mean((2, 3)))


def trains_alike(wrap, steps=4):
    """A wrapped model of several processes against the plain one with the whole batch; equal local batches."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    plain = Net().double()
    model = wrap(brn.convert_sync(copy.deepcopy(plain)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    for step in range(steps):
        x, target = normal(2 * world, 3, 5, 5, seed=step) * (1 + step), normal(2 * world, 4, seed=100 + step)
        sizes = [2] * world
        for net, optimizer, xs, targets in (
            (plain, optimizers[0], x, target), (model, optimizers[1], part(x, sizes), part(target, sizes)),
        ):  # fmt: skip
            optimizer.zero_grad()
            nn.functional.mse_loss(net(xs), targets).backward()
            optimizer.step()
    ours = {re.sub(r"module\.|_orig_mod\.", "", name): value for name, value in model.state_dict().items()}
    for name, expected in plain.state_dict().items():
        value = ours[name].full_tensor() if hasattr(ours[name], "full_tensor") else ours[name]
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def ddp():
    for broadcast_buffers in (True, False):
        trains_alike(lambda model, b=broadcast_buffers: DistributedDataParallel(model, broadcast_buffers=b))


def fsdp():
    def shard(model):
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in (model.norm1, model.norm2, model):
            fully_shard(block, mesh=mesh)
        return model

    trains_alike(shard)


def checkpointing():
    """The second run exchanges statistics again, and moves nothing."""

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, x):
            return checkpoint(self.module, x, use_reentrant=False)

    trains_alike(lambda model: DistributedDataParallel(Checkpointed(model)))


def recomputing():
    """Outputs computed again of the statistics of all: bits and gradients of the run that keeps them."""

    class Recomputing(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

        @brn.recompute_activations()
        def forward(self, x):
            return self.module(x)

    trains_alike(lambda model: DistributedDataParallel(Recomputing(model)))
    for dtype in (torch.float32, torch.bfloat16):
        for activation in (None, "silu"):
            torch.manual_seed(dist.get_rank())
            layer = brn.convert_sync(brn.BatchRenorm2d(CHANNELS, schedule=LIMITS, activation=activation))
            conv = nn.Conv2d(CHANNELS, 2, 3).to(dtype)
            x = (normal(2 + dist.get_rank(), CHANNELS, 5, 5, seed=dist.get_rank()) * 2 + 0.5).to(dtype)
            grads = []
            for on in (False, True):
                mine, conv.weight.grad, inputs = copy.deepcopy(layer), None, x.clone().requires_grad_()
                forward = brn.recompute_activations()(mine.forward) if on else mine
                conv(forward(inputs)).square().sum().backward()
                grads.append([inputs.grad, conv.weight.grad, mine.weight.grad, mine.running_var])
            assert all(map(torch.equal, *grads))


def compiled():
    """One graph, and the same training."""
    trains_alike(lambda model: DistributedDataParallel(torch.compile(model, fullgraph=True, backend="aot_eager")))
    torch.manual_seed(0)
    eager = brn.convert_sync(Net())
    model = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = normal(2 + dist.get_rank(), 3, 5, 5, seed=10 * step + dist.get_rank(), dtype=torch.float32)
        dy = normal(x.shape[0], 4, seed=step, dtype=torch.float32)
        for net in (eager, model):
            net(x).backward(dy)
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(eager.norm2.running_var, model.norm2.running_var)


def groups():
    """A layer of two groups of a half each; evaluation and a single process exchange nothing."""
    world, rank = dist.get_world_size(), dist.get_rank()
    halves = [dist.new_group(range(world // 2)), dist.new_group(range(world // 2, world))]
    mine = halves[rank >= world // 2]
    layer = copy.deepcopy(brn.BatchRenorm1d(3, process_group=mine, momentum=1.0))
    layer(normal(4, 3, seed=rank, dtype=torch.float32))
    ranks = range(world // 2) if rank < world // 2 else range(world // 2, world)
    expected = torch.cat([normal(4, 3, seed=r, dtype=torch.float32) for r in ranks]).mean(0)
    torch.testing.assert_close(layer.running_mean, expected)
    if rank == 0:
        layer.eval()(torch.randn(2, 3))  # would wait for the others


def dead():
    """One process dies before its second step: the others must learn of it, not wait for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before they have learnt of it themselves
    layer = brn.convert_sync(brn.BatchRenorm1d(3))
    layer(torch.randn(4, 3))
    if dist.get_rank() == 1:
        os._exit(3)
    fails(lambda: layer(torch.randn(4, 3)))


def mismatch():
    """One process has a batch of the wrong shape: it says so, and the others do not wait for ever."""
    layer = brn.convert_sync(brn.BatchRenorm1d(3))
    if dist.get_rank() == 1:
        try:
            layer(torch.randn(4, 2))
        except ValueError as error:
            assert "expected shape (2,)" in str(error), error
        return
    fails(lambda: layer(torch.randn(4, 3)))


def fused():
    """A fused network under DDP: per process and synchronized, the gradients and statistics of the one not fused."""
    for sync in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        plain = brn.convert_batchnorm(block, schedule=LIMITS).double()
        plain = brn.convert_sync(plain) if sync else plain
        x = normal(4, 3, 5, 5, seed=dist.get_rank())
        results = []
        for model in (plain, brn.fuse(copy.deepcopy(plain))):
            network = DistributedDataParallel(model)
            for _ in range(2):
                network(x).square().sum().backward()
            results.append([*(p.grad for p in model.parameters()), *model.state_dict().values()])
        assert len(brn.fusion_report(model).fused) == 1
        for ours, theirs in zip(*reversed(results), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def monitored():
    """Under DDP a synchronized layer's numbers are those of one process with the whole batch."""
    model = nn.Sequential(brn.convert_sync(brn.BatchRenorm1d(CHANNELS, schedule=LIMITS))).double()
    alone = nn.Sequential(brn.BatchRenorm1d(CHANNELS, schedule=LIMITS)).double()
    with brn.ClipMonitor(model, every=1) as ours, brn.ClipMonitor(alone, every=1) as one:
        network = DistributedDataParallel(model)
        for step in range(4):
            parts = [normal(4, CHANNELS, seed=10 * step + r) + 0.1 * r for r in range(dist.get_world_size())]
            network(parts[dist.get_rank()]).sum().backward()
            alone(torch.cat(parts))
    assert len(ours.rows()) == 4
    for row, expected in zip(ours.rows(), one.rows(), strict=True):
        for name in ("clipped_r", "clipped_d", "hits", "r_5", "r_95", "d_5", "d_95"):
            assert abs(row[name] - expected[name]) < 1e-9, (name, row, expected)
    assert any(row["clipped_d"] > 0 for row in ours.rows())


def fails(call):
    start = datetime.datetime.now()
    try:
        call()
    except RuntimeError as error:
        assert (datetime.datetime.now() - start).total_seconds() < 3 * TIMEOUT_S
        print("the others learnt:", str(error)[:80], flush=True)
        return
    raise AssertionError("went on without a process")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    *checks, backend = sys.argv[1:]
    for check in checks:
        with brn.use_backend(backend):
            globals()[check]()
        print(f"{check}: passed", flush=True)
    if checks[0] not in ("dead", "mismatch"):
        dist.destroy_process_group()
