"""Mixed precision: autocast, gradient scaling, and models that are bfloat16 throughout."""

import copy
import io

import pytest
import torch
from oracle import Oracle
from tolerances import assert_three_way
from torch import nn

import brn_kernels as brn

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
OPEN = brn.ClipSchedule.constant(1.3, 0.3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype)


def layer_of(device, activation="relu"):
    layer = brn.BatchRenorm2d(4, momentum=0.1, schedule=OPEN, activation=activation, device=device)
    with torch.no_grad():
        layer.weight.copy_(normal(4, seed=11))
        layer.bias.copy_(normal(4, seed=12))
    return layer


def classifier(device, schedule=OPEN):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), brn.BatchRenorm2d(4, momentum=0.1, schedule=schedule, activation="relu"),
        nn.Conv2d(4, 4, 3), brn.BatchRenorm2d(4, momentum=0.1, schedule=schedule), nn.Flatten(), nn.Linear(16, 3),
    ).to(device)  # fmt: skip


@HALVES
@pytest.mark.parametrize("extra", ["plain", "residual", "mask"])
def test_autocast_changes_nothing_in_the_layer(backend, device, dtype, extra):
    """A half input with float32 parameters: the same bits as without autocast, so nothing is cast on the way."""
    x, residual, dy = (normal(3, 4, 3, 5, seed=i).to(device, dtype) for i in range(3))
    mask = (normal(3, 3, 5, seed=3) < 0.5).to(device) if extra == "mask" else None
    results = []
    for enabled in (False, True):
        layer = layer_of(device)
        a = x.clone().requires_grad_()
        b = residual.clone().requires_grad_() if extra == "residual" else None
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            y = layer(a, b, mask)
        y.backward(dy)
        assert y.dtype == a.grad.dtype == dtype and (b is None or b.grad.dtype == dtype)
        assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        results.append([y, a.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
        results[-1] += [] if b is None else [b.grad]
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


class Block(nn.Module):
    """A convolution, Batch Renormalization (some function of its output) with a residual, a linear layer."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.linear = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(60, 3)
        self.weight, self.bias = nn.Parameter(normal(4, seed=11)), nn.Parameter(normal(4, seed=12))
        self.norm = norm

    def forward(self, x):
        h = self.convolution(x)
        return self.linear(self.norm(self, h).flatten(1))


def ours(block, h):
    y = brn.batch_renorm(
        h, torch.zeros(4, device=h.device), torch.ones(4, device=h.device), block.weight, block.bias, True, r_max=1.3,
        d_max=0.3, residual=h, activation="silu",
    )  # fmt: skip
    assert y.dtype == h.dtype != block.weight.dtype
    return y


def torchs(block, h):
    """The same of PyTorch's functions, as a user would write it."""
    with torch.no_grad():
        var, mean = torch.var_mean(h.float(), (0, 2, 3), correction=0)
        r = ((var + 1e-5) / (1 + 1e-5)).sqrt().clamp(1 / 1.3, 1.3).to(h.dtype)[:, None, None]
        d = (mean / (1 + 1e-5) ** 0.5).clamp(-0.3, 0.3).to(h.dtype)[:, None, None]
    y = nn.functional.batch_norm(h, None, None, training=True) * r + d
    y = y * block.weight.to(h.dtype)[:, None, None] + block.bias.to(h.dtype)[:, None, None]
    return nn.functional.silu(y + h)


def truth(block, h):
    oracle = Oracle(4, weight=block.weight, bias=block.bias, activation="silu", r_max=1.3, d_max=0.3)
    return oracle(h, h)


@HALVES
def test_gradients_of_a_network_under_autocast(backend, device, dtype):
    """By the three-way rule. With SiLU, since at the kink of ReLU a rounding turns a gradient on or off."""
    x, dy = normal(8, 2, 3, 5) * 2 + 1, normal(8, 3, seed=1)
    gradients = []
    for norm in (ours, torchs, truth):
        block = Block(norm)
        if norm is truth:
            block.double()(x.double()).backward(dy.double())
        else:
            block.to(device)
            with autocast(device, dtype):
                y = block(x.to(device))
            assert y.dtype == dtype
            y.backward(dy.to(device, dtype))
        gradients.append({name: p.grad.cpu() for name, p in block.named_parameters()})
    for name, gradient in gradients[0].items():
        # as exact as its dtype allows under autocast, where all but the norm's own gradients are rounded to half
        assert gradient.dtype == torch.float32
        assert_three_way(gradient.to(dtype), gradients[1][name], gradients[2][name], name)


@HALVES
def test_evaluation_under_autocast(device, dtype):
    layer = layer_of(device)
    layer(normal(8, 4, 3, 5).to(device))
    layer.eval()
    x, residual = normal(3, 4, 3, 5, seed=1).to(device, dtype), normal(3, 4, 3, 5, seed=2).to(device, dtype)
    expected = layer(x, residual)
    with autocast(device, dtype):
        y = layer(x, residual)
        wide = layer(x.float(), residual.float())
    assert y.dtype == dtype and torch.equal(y, expected)
    assert wide.dtype == torch.float32, "as nn.BatchNorm, the layer computes in its input's dtype"


@HALVES
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_residual_is_not_cast(device, dtype, training):
    """As elsewhere; a shortcut that autocast left in float32 needs ``.to(x.dtype)``."""
    layer = layer_of(device).train(training)
    x, shortcut = normal(3, 4, 3, 5).to(device, dtype), normal(3, 4, 3, 5, seed=1).to(device)
    with autocast(device, dtype):
        with pytest.raises(ValueError, match=f"residual: expected x's dtype {dtype}, got torch.float32"):
            layer(x, shortcut)
        assert layer.num_batches_tracked.item() == 0
        assert layer(x, shortcut.to(x.dtype)).dtype == dtype


@HALVES
def test_compiled_under_autocast(device, dtype):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), layer_of("cpu")).to(device)
    peer = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, dy = normal(4, 2, 5, 5).to(device), normal(4, 4, 3, 3, seed=1).to(device, dtype)
    for network in (compiled, peer):
        with autocast(device, dtype):
            y = network(x)
        assert y.dtype == dtype
        y.backward(dy)
    for (name, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad), name
    assert torch.equal(model[1].running_var, peer[1].running_var)


def scaled_step(model, optimizer, scaler, x, wanted, device):
    optimizer.zero_grad()
    with autocast(device, torch.float16):
        y = model(x.to(device))
    scaler.scale(nn.functional.mse_loss(y.float(), wanted.to(device))).backward()
    scaler.step(optimizer)
    scaler.update()
    return y.detach()


@pytest.mark.many_steps
@pytest.mark.parametrize("overflow", ["in the forward", "in the backward"])
def test_grad_scaler_over_an_overflowing_batch(backend, device, overflow):
    """The step is skipped; the run goes on, bit by bit, as one that never met the batch."""
    batches, wanted = [normal(6, 2, 6, 6, seed=i) for i in range(8)], [normal(6, 3, seed=50 + i) for i in range(8)]
    runs = []
    for meets in (False, True):
        model = classifier(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1000)
        for x, target in zip(batches[:3], wanted, strict=False):
            scaled_step(model, optimizer, scaler, x, target, device)
        if meets:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            bad = batches[3] * (1e6 if overflow == "in the forward" else 1)
            y = scaled_step(
                model, optimizer, scaler, bad, wanted[3] * (1e6 if overflow == "in the backward" else 1), device
            )
            assert y.isfinite().all() == (overflow == "in the backward")
            assert scaler.get_scale() == 2.0**9, "the step was skipped"
            for name, value in model.state_dict().items():
                if "num_batches_tracked" in name:
                    assert value == before[name] + 1
                elif "running" in name and overflow == "in the backward":  # its forward was as good as any
                    assert value.isfinite().all() and not torch.equal(value, before[name])
                else:
                    assert torch.equal(value, before[name]), name
        outputs = [
            scaled_step(model, optimizer, scaler, x, t, device) for x, t in zip(batches[4:], wanted[4:], strict=True)
        ]
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert scaler.get_scale() == 2.0 ** (9 if meets else 10)
        runs.append(outputs)
    if overflow == "in the forward":
        assert torch.equal(runs[0][0], runs[1][0])
        assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(*runs, strict=True))


@pytest.mark.many_steps
def test_a_bfloat16_model_trains_is_saved_and_loaded(backend, device):
    model = classifier(device, schedule=brn.ClipSchedule.for_training(40)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, wanted = normal(16, 2, 6, 6).to(device, torch.bfloat16), normal(16, 3, seed=1).to(device, torch.bfloat16)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        y = model(x)
        assert y.dtype == torch.bfloat16
        losses.append(nn.functional.mse_loss(y, wanted))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    norm = model[1]
    assert norm.weight.dtype == norm.weight.grad.dtype == torch.bfloat16 and norm.running_var.dtype == torch.float32
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = classifier(device).to(torch.bfloat16)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other[1].running_var, norm.running_var), "float32 statistics, not rounded on the way"
    assert torch.equal(other.eval()(x), model.eval()(x))
