"""What must hold whatever the numbers: identities of the algorithm."""

import pytest
import torch
from tolerances import UNITS, assert_close

import brn_kernels as brn


def data(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("schedule", [brn.ClipSchedule.batchnorm(), brn.ClipSchedule.constant(2, 0.5)], ids=str)
def test_dx_sums_to_zero_in_every_channel(backend, device, schedule):
    x = (3 * data(4, 5, 3, 3) + 1).to(device).requires_grad_()
    dy = data(4, 5, 3, 3, seed=1).to(device)
    brn.BatchRenorm2d(5, schedule=schedule, dtype=torch.float64, device=device)(x).backward(dy)
    assert x.grad.abs().max() > 0.01
    assert x.grad.sum((0, 2, 3)).abs().max() < UNITS * x.numel() * 2e-16


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "shape, names", [((6, 4), "1d"), ((3, 4, 5), "1d"), ((3, 4, 2, 5), "2d"), ((2, 4, 2, 2, 3), "3d")]
)
def test_with_closed_limits_it_is_batchnorm(backend, device, momentum, shape, names):
    renorm = getattr(brn, f"BatchRenorm{names}")
    batchnorm = getattr(torch.nn, f"BatchNorm{names}")
    ours = renorm(4, momentum=momentum, schedule=brn.ClipSchedule.batchnorm(), dtype=torch.float64, device=device)
    torchs = batchnorm(4, momentum=momentum, dtype=torch.float64, device=device)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
            q.copy_(p.copy_(1 + 0.5 * data(4)))
    for step in range(3):
        x = (2 * data(*shape, seed=step) + step).to(device)
        dy = data(*shape, seed=step + 9).to(device)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), torchs(b)
        y.backward(dy)
        z.backward(dy)
        assert_close(y, z, "y")
        assert_close(a.grad, b.grad, "dx")
    for name, value in torchs.state_dict().items():
        assert_close(ours.state_dict()[name].double(), value.double(), name)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert_close(p.grad, q.grad)


def test_unclipped_training_equals_evaluation_with_the_statistics_from_before(backend, device):
    layer = brn.BatchRenorm2d(5, schedule=brn.ClipSchedule.unclipped(), dtype=torch.float64, device=device)
    for step in range(3):
        x = (data(4, 5, 3, 3, seed=step) * 2 + 1).to(device)
        expected = layer.eval()(x)
        assert_close(layer.train()(x), expected)


def test_unclipped_gradient_is_batchnorms_times_r(backend, device):
    layer = brn.BatchRenorm1d(3, schedule=brn.ClipSchedule.unclipped(), dtype=torch.float64, device=device)
    layer.running_var.copy_(torch.tensor([0.25, 1.0, 9.0]))
    x = data(8, 3).to(device)
    r = ((x.var(0, unbiased=False) + 1e-5) / (layer.running_var + 1e-5)).sqrt()
    ours, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
    dy = data(8, 3, seed=1).to(device)
    layer(ours).backward(dy)
    torch.nn.functional.batch_norm(torchs, None, None, training=True).backward(dy)
    assert_close(ours.grad, torchs.grad * r)


def test_order_of_samples_does_not_matter(backend, device):
    x = data(6, 3, 4).to(device)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    layers = [brn.BatchRenorm1d(3, schedule=brn.ClipSchedule.constant(1.2, 0.1), dtype=torch.float64, device=device)]
    layers.append(brn.BatchRenorm1d(3, schedule=layers[0].schedule, dtype=torch.float64, device=device))
    assert_close(layers[0](x)[order.to(device)], layers[1](x[order.to(device)]))
    assert_close(layers[0].running_var, layers[1].running_var)


def test_same_input_same_bits(backend, device):
    x = data(4, 6, 5, 5, dtype=torch.float32).to(device)
    dy = data(4, 6, 5, 5, seed=1, dtype=torch.float32).to(device)
    results = []
    for _ in range(2):
        layer = brn.BatchRenorm2d(6, schedule=brn.ClipSchedule.constant(1.1, 0.1), device=device)
        a = x.clone().requires_grad_()
        y = layer(a)
        y.backward(dy)
        results.append([y, a.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_without_running_statistics_it_is_batchnorm_on_the_batch(backend, device):
    layer = brn.BatchRenorm2d(3, track_running_stats=False, dtype=torch.float64, device=device)
    x = data(4, 3, 5, 5).to(device) * 7 + 3
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    assert_close(layer(x), expected)
    assert_close(layer.eval()(x), expected)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_large_mean_small_deviation_keeps_its_digits(backend, device):
    """E[x^2] - E[x]^2 would lose every digit of this variance in float32."""
    x = (data(64, 2, 8, 8) * 0.5 + 4096).float()
    layer = brn.BatchRenorm2d(2, momentum=1.0, schedule=brn.ClipSchedule.batchnorm(), device=device)
    layer(x.to(device))
    assert torch.allclose(layer.running_var.cpu().double(), x.double().var((0, 2, 3)), rtol=1e-5)
