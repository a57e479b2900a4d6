"""Trainings of many steps: eager, captured in a CUDA graph, compiled."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from gpu_tools import DEVICE, IS_GPU, Captured, scaled, warm_up
from torch import nn

import brn_kernels as brn

pytestmark = pytest.mark.usefixtures("kernels")
WIDTHS, BATCH, SIDE, STEPS = scaled(((24, 40), 32, 14, 10_000), ((2, 3), 2, 7, 2))


class Recorded(nn.Module):
    """A small network that keeps what its normalizations saw."""

    def __init__(self):
        super().__init__()
        schedule = brn.ClipSchedule(r_max=1.5, d_max=0.5, hold=1_000, r_ramp=6_000, d_ramp=4_000)
        few, more = WIDTHS
        self.conv1, self.conv2 = nn.Conv2d(3, few, 3), nn.Conv2d(few, more, 3, stride=2)
        self.norm1 = brn.BatchRenorm2d(few, momentum=0.05, schedule=schedule, activation="relu")
        self.norm2 = brn.BatchRenorm2d(more, schedule=schedule, activation="silu")
        self.head = nn.Linear(more, 10)
        inner, last = SIDE - 2, (SIDE - 3) // 2
        self.seen = [
            torch.zeros(BATCH, few, inner, inner, device=DEVICE), torch.zeros(BATCH, more, last, last, device=DEVICE),
        ]  # fmt: skip

    def forward(self, x):
        for conv, norm, seen in ((self.conv1, self.norm1, self.seen[0]), (self.conv2, self.norm2, self.seen[1])):
            x = conv(x)
            seen.copy_(x.detach())
            x = norm(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
def test_statistics_of_10_000_steps_equal_those_of_float64(is_captured):
    torch.manual_seed(0)
    model = Recorded().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    x, target = torch.zeros(BATCH, 3, SIDE, SIDE, device=DEVICE), torch.zeros(BATCH, dtype=torch.long, device=DEVICE)
    norms = (model.norm1, model.norm2)
    truths = [[torch.tensor(start, device=DEVICE).double().repeat(n.num_features) for start in (0, 1)] for n in norms]

    def step():
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    def follow():
        for norm, seen, truth in zip(norms, model.seen, truths, strict=True):
            var, mean = torch.var_mean(seen.double(), (0, 2, 3))
            truth[0].lerp_(mean, norm.momentum)
            truth[1].lerp_(var, norm.momentum)

    run = step
    if is_captured:
        start = copy.deepcopy(model.state_dict())
        warm_up(step)
        graph = Captured(step)
        model.load_state_dict(start)
        run = graph.replay
    for _ in range(STEPS):
        x.normal_()
        x.mul_(2).add_(1)
        target.random_(10)
        run()
        follow()
    for norm, (mean, var) in zip(norms, truths, strict=True):
        assert norm.num_batches_tracked == STEPS
        assert ((norm.running_mean - mean).abs() <= 2e-5 * (mean.abs() + var.sqrt())).all()
        assert ((norm.running_var - var).abs() <= 2e-5 * var).all()
    assert all(p.isfinite().all() for p in model.parameters())


class Small(nn.Module):
    """What stands in for ResNet-18 where kernels are interpreted."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


def network():
    if not IS_GPU:
        return Small()
    model = importlib.import_module("bench.networks").import_torchvision().models.resnet18(num_classes=10)
    model.maxpool = nn.AvgPool2d(3, 2, 1)  # the backward of the maximum adds in no fixed order
    return model


IMAGES, SIZE, TRAINED, MIDDLE = scaled((64, 64, 300, 150), (2, 8, 3, 2))
NORMS = {"BatchNorm": None, "closed": brn.ClipSchedule.batchnorm(), "renorm": brn.ClipSchedule.for_training(TRAINED)}


class Training:
    """ResNet-18 on generated images whose label is the strongest of ten patterns, in bf16 channels_last."""

    def __init__(self, norm, mode="eager"):
        torch.manual_seed(0)
        model = network()
        if NORMS[norm] is not None:
            model = brn.fuse(brn.convert_batchnorm(model, schedule=NORMS[norm], momentum=0.1))
        self.model = model.to(DEVICE).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9)
        self.forward = self.model
        if mode == "compiled" and IS_GPU:
            torch._dynamo.reset()  # else it gives up at the eighth model
            self.forward = torch.compile(self.model)
        self.patterns = F.interpolate(torch.randn(10, 3, SIZE // 8, SIZE // 8, device=DEVICE), SIZE)
        self.x = torch.zeros(IMAGES, 3, SIZE, SIZE, device=DEVICE).to(memory_format=torch.channels_last)
        self.target = torch.zeros(IMAGES, dtype=torch.long, device=DEVICE)
        self.loss, self.losses, self.mode, self.run = torch.zeros((), device=DEVICE), [], mode, self.step

    def step(self):
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = F.cross_entropy(self.forward(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def train(self, steps):
        for _ in range(steps):
            k = len(self.losses)
            data = torch.Generator(DEVICE).manual_seed(k)
            self.target.random_(10, generator=data)
            self.x.normal_(generator=data)
            self.x.add_(0.5 * self.patterns[self.target])
            if self.mode == "captured" and k == 3:
                self.run = Captured(self.step).replay
            self.run()
            self.losses.append(self.loss.clone())
        return torch.stack(self.losses)

    def resume(self, other):
        """Go on from where another one is, in the same memory: a graph knows no other."""
        self.model.load_state_dict(other.model.state_dict())
        for ours, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            momentum = self.optimizer.state[ours]["momentum_buffer"]
            momentum.copy_(other.optimizer.state[theirs]["momentum_buffer"])
        self.losses = list(other.losses)


def needs_torchvision():
    if IS_GPU:
        pytest.importorskip("torchvision")


@pytest.mark.parametrize("norm", NORMS)
def test_resnet18_learns_alike_in_all_modes(kernels, norm):
    needs_torchvision()
    if kernels == "native" and NORMS[norm] is None:
        pytest.skip("PyTorch's own kernels, tried beside Triton's")
    eager = Training(norm).train(TRAINED)
    found = {"eager": eager}
    for mode in ("compiled", "captured"):
        found[mode] = Training(norm, mode).train(TRAINED)
    few = 6  # of which three are captured
    # the same kernels in the same order: only what cuDNN and cuBLAS choose in a capture may differ, by roundings
    assert torch.allclose(found["captured"][:few], eager[:few], rtol=5e-3), found["captured"][:few] - eager[:few]
    # compiled, bfloat16 is rounded at other places, and each step doubles the difference
    assert torch.allclose(found["compiled"][:3], eager[:3], rtol=0.02), found["compiled"][:3] - eager[:3]
    for mode, losses in found.items():
        assert losses.isfinite().all(), mode
        assert not IS_GPU or losses[-50:].mean() < 0.5 * losses[:5].mean(), mode
    print({mode: round(losses[-50:].mean().item(), 4) for mode, losses in found.items()})


def test_with_closed_limits_resnet18_begins_as_with_batchnorm():
    needs_torchvision()
    ours, batchnorm = Training("closed").train(3), Training("BatchNorm").train(3)
    # PyTorch rounds to bfloat16 between the layer and its ReLU, we do not
    assert torch.allclose(ours, batchnorm, rtol=0.02), ours - batchnorm


@pytest.mark.parametrize("mode", ["compiled", "captured"])
def test_one_step_from_the_middle_of_a_training_is_eagers(mode):
    """There the limits are open, and channels clip: at the beginning they are closed."""
    needs_torchvision()
    eager, other = Training("renorm"), Training("renorm", mode)
    other.train(4 if mode == "captured" else 1)
    eager.train(MIDDLE)
    other.resume(eager)
    assert NORMS["renorm"].limits(MIDDLE)[0] > 1 and NORMS["renorm"].limits(MIDDLE)[1] > 0
    before = copy.deepcopy(eager.model.state_dict())
    losses = eager.train(1)[-1], other.train(1)[-1]
    assert torch.allclose(*losses, rtol=0.05 if mode == "compiled" else 5e-3, atol=5e-3), losses
    moved, difference = {}, {}
    for (name, ours), truth in zip(other.model.state_dict().items(), eager.model.state_dict().values(), strict=True):
        kind = name.rpartition(".")[2]
        if truth.is_floating_point():
            moved[kind] = moved.get(kind, 0) + (truth - before[name]).double().square().sum()
            difference[kind] = difference.get(kind, 0) + (truth - ours).double().square().sum()
        else:
            assert torch.equal(ours, truth), name
    assert {"weight", "bias", "running_mean", "running_var"} <= set(moved)
    for kind in moved:  # bfloat16 activations are a percent apart; what did not move, or elsewhere, is off by 1 or more
        error = (difference[kind] / moved[kind]).sqrt().item()
        assert error < 0.2, (kind, error)
