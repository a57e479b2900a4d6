"""Gradients against finite differences, and derivatives of the gradients, r and d being constants."""

import pytest
import torch
from oracle import ACTIVATIONS, Oracle
from tolerances import assert_close

import brn_kernels as brn
from brn_kernels.backends import reference

# r and d as functions of x would be seen by finite differences: freeze them
FROZEN_R, FROZEN_D = torch.tensor([0.7, 1.6], dtype=torch.float64), torch.tensor([-0.4, 0.9], dtype=torch.float64)


@pytest.fixture
def frozen_correction(monkeypatch):
    frozen = (FROZEN_R, FROZEN_D, torch.tensor([True, True]))
    monkeypatch.setattr(reference, "correction", lambda *_: frozen)


def problem(residual, masked):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]], dtype=torch.bool) if masked else None
    return [normal(3, 2, 3), normal(2), normal(2)] + ([normal(3, 2, 3)] if residual else []), mask


def function_of(mask, activation):
    def renorm(x, weight, bias, residual=None):
        mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        return brn.batch_renorm(x, mean, var, weight, bias, True, residual=residual, mask=mask, activation=activation)

    return renorm


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_first_and_second_derivatives_by_finite_differences(frozen_correction, activation, residual, masked):
    inputs, mask = problem(residual, masked)
    with brn.use_backend("reference"):
        assert torch.autograd.gradcheck(function_of(mask, activation), inputs)
        assert torch.autograd.gradgradcheck(function_of(mask, activation), inputs, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradient_penalty_equals_the_oracles(backend, device, activation, residual):
    generator = torch.Generator().manual_seed(0)
    x, extra, dy = (torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    layer = brn.BatchRenorm1d(3, schedule=brn.ClipSchedule.constant(1.2, 0.1), activation=activation, device=device)
    layer.double()
    oracle = Oracle(3, r_max=1.2, d_max=0.1, activation=activation)
    oracle.weight, oracle.bias = (p.detach().cpu().clone().requires_grad_() for p in layer.parameters())
    found = []
    for forward, parameters, where in ((layer, list(layer.parameters()), device), (oracle, [oracle.weight], "cpu")):
        a = x.to(where, copy=True).requires_grad_()
        b = extra.to(where, copy=True).requires_grad_() if residual else None
        y = forward(a, b)
        (dx,) = torch.autograd.grad(y, a, dy.to(where), create_graph=True)
        penalty = dx.square().sum() + (y * y).sum()
        found.append([g.cpu() for g in torch.autograd.grad(penalty, [a, parameters[0]] + ([b] if residual else []))])
    for ours, truth in zip(*found, strict=True):
        assert_close(ours, truth, scale=100)


def test_second_backward_of_x_given_twice(backend, device):
    """Its gradient as x and its gradient as residual were once both counted twice."""
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    grads = []
    for create_graph in (False, True):
        a = x.to(device, copy=True).requires_grad_()
        y = brn.batch_renorm(a, *statistics(device), training=True, residual=a, activation="silu")
        grads.append(torch.autograd.grad(y, a, torch.ones_like(y) + a.detach(), create_graph=create_graph)[0])
    assert_close(grads[1], grads[0])


def statistics(device):
    return torch.zeros(2, dtype=torch.float64, device=device), torch.ones(2, dtype=torch.float64, device=device)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_only_the_gradient_asked_for(backend, device, wanted):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in {"x": (4, 2, 3), "weight": (2,), "bias": (2,), "residual": (4, 2, 3)}.items()
    }

    def run(names):
        leaves = {name: t.to(device, copy=True).requires_grad_(name in names) for name, t in tensors.items()}
        x, weight, bias, residual = leaves.values()
        y = brn.batch_renorm(x, *statistics(device), weight, bias, True, residual=residual, activation="relu")
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view_as(y))
        return {name: leaf.grad for name, leaf in leaves.items()}

    alone, together = run({wanted}), run(set(tensors))
    assert [name for name, grad in alone.items() if grad is not None] == [wanted]
    assert torch.equal(alone[wanted], together[wanted])


@pytest.mark.parametrize("activation", [None, "relu", "silu", "hardswish"])
@pytest.mark.parametrize("mode", ["evaluation", "training", "create_graph"])
def test_nan_under_the_mask_reaches_no_gradient(backend, device, activation, mode):
    layer = brn.BatchRenorm2d(3, activation=activation, device=device).train(mode != "evaluation")
    x, residual = torch.randn(2, 4, 3, 2, 2, device=device).unbind()
    x[0], residual[0] = float("nan"), float("inf")
    x.requires_grad_(), residual.requires_grad_()
    mask = torch.ones(4, 2, 2, dtype=torch.bool, device=device)
    mask[0] = False
    y = layer(x, residual, mask)
    wanted = [x, residual, layer.weight, layer.bias]
    gradients = torch.autograd.grad(y, wanted, torch.randn_like(y), create_graph=mode == "create_graph")
    assert all(g.isfinite().all() for g in (y, *gradients))
    assert not gradients[0][0].any() and not gradients[1][0].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_saved_tensors_that_come_back_in_another_memory_format(backend, device, layout):
    """The packed bits of ReLU are in the order x had: pinning save_on_cpu hands back a contiguous x."""
    other = {"contiguous": torch.channels_last, "channels_last": torch.contiguous_format}[layout]
    mine = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    x = torch.randn(2, 16, 4, 4, device=device).to(memory_format=mine).requires_grad_()
    residual, dy = torch.randn(2, 2, 16, 4, 4, device=device).unbind()
    gradients = []
    for unpack in (lambda t: t, lambda t: t.contiguous(memory_format=other) if t.dim() == 4 else t):
        layer = brn.BatchRenorm2d(16, activation="relu", device=device)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = layer(x, residual)
        gradients += torch.autograd.grad(y, x, dy)
    assert torch.allclose(*gradients, atol=1e-5)
