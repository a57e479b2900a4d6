"""Half and bfloat16: as accurate as PyTorch's, and no statistic lost."""

import pytest
import torch
from oracle import Oracle
from tolerances import assert_three_way

import brn_kernels as brn

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def torchs_composition(x, dy, weight, bias, r, d, activation):
    """What a user would write: F.batch_norm of the batch, then the correction, in the same dtype."""
    x = x.clone().requires_grad_()
    y = torch.nn.functional.batch_norm(x, None, None, training=True) * r.to(x.dtype)[:, None, None]
    y = (y + d.to(x.dtype)[:, None, None]) * weight.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]
    y = torch.relu(y) if activation == "relu" else y
    y.backward(dy)
    return y, x.grad


@HALVES
@pytest.mark.parametrize("parameters", ["float32", "half"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_three_way_rule(backend, device, dtype, parameters, activation, channels_last):
    generator = torch.Generator().manual_seed(0)
    layer = brn.BatchRenorm2d(6, schedule=brn.ClipSchedule.constant(1.3, 0.3), activation=activation, device=device)
    layer = layer.to(dtype) if parameters == "half" else layer
    oracle = Oracle(6, r_max=1.3, d_max=0.3, activation=activation)
    oracle.weight, oracle.bias = layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double()
    for _ in range(3):
        x = (torch.randn(8, 6, 7, 5, generator=generator) * 1.5 + 0.4).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        dy = torch.randn(x.shape, generator=generator).to(dtype)
        ours = x.to(device, copy=True).requires_grad_()
        y = layer(ours)
        y.backward(dy.to(device))
        x64 = x.double().requires_grad_()
        y64 = oracle(x64)
        y64.backward(dy.double())
        z, dz = torchs_composition(x, dy, oracle.weight, oracle.bias, oracle.r, oracle.d, activation)
        assert y.dtype == ours.grad.dtype == dtype
        assert_three_way(y.cpu(), z, y64, "y")
        assert_three_way(ours.grad.cpu(), dz, x64.grad, "dx")
        assert layer.weight.grad.dtype == layer.weight.dtype


@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_float16_of_standard_deviation_300_keeps_a_finite_variance(backend, device, parameters):
    """300 squared is no float16: the running scale of four public layers becomes Inf."""
    layer = brn.BatchRenorm2d(3, momentum=0.5, schedule=brn.ClipSchedule.constant(3, 5), device=device)
    layer = layer.half() if parameters == "half" else layer
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(300).half().to(device)
    for _ in range(20):
        y = layer(x)
    assert y.dtype == torch.float16 and y.isfinite().all()
    variance = x.double().var((0, 2, 3))
    assert torch.allclose(layer.running_var.double(), variance, rtol=1e-4)
    assert layer.eval()(x).isfinite().all()


@HALVES
def test_converting_a_model_to_half_keeps_its_statistics(device, dtype):
    layer = brn.BatchRenorm1d(2, device=device)
    layer.running_mean.copy_(torch.tensor([1 / 3, 70_000.0]))
    layer.running_var.copy_(torch.tensor([1e5, 1e-9]))
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_mean, before[0]) and torch.equal(layer.running_var, before[1])
    assert layer.double().running_mean.dtype == torch.float64
    assert layer.to("meta").half().running_var.dtype == torch.float32


@HALVES
def test_a_layer_made_in_half_has_float32_statistics(backend, device, dtype):
    layer = brn.BatchRenorm1d(2, dtype=dtype, device=device)
    assert layer.running_var.dtype == torch.float32 and layer.weight.dtype == dtype
    layer(torch.randn(4, 2, dtype=dtype, device=device))
    layer.eval()(torch.randn(4, 2, dtype=dtype, device=device))


def test_small_updates_are_not_lost_in_bfloat16(backend, device):
    """A bfloat16 running mean would stay where an update is below 1/512 of it."""
    layer = brn.BatchRenorm1d(1, momentum=0.001, dtype=torch.bfloat16, device=device)
    layer.running_mean.fill_(1.0)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16, device=device)
    for _ in range(100):
        layer(x)
    assert layer.running_mean.item() == pytest.approx(0.5 + 0.5 * 0.999**100, rel=1e-5)


def test_half_statistics_given_to_the_function_stay_half_and_finite(backend, device):
    mean = torch.zeros(2, dtype=torch.float16, device=device)
    var = torch.ones(2, dtype=torch.float16, device=device)
    x = torch.randn(32, 2, device=device).half() * torch.tensor([1.0, 1000.0], device=device).half()
    brn.batch_renorm(x, mean, var, training=True, momentum=0.9)
    assert var.isfinite().all() and mean.isfinite().all()
    assert var[1] == 1, "a variance that does not fit keeps its old value"
