"""Outputs, gradients and state against the float64 oracle, three steps at a time."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ACTIVATIONS, Oracle
from tolerances import assert_close

import brn_kernels as brn

LAYERS = {2: brn.BatchRenorm1d, 3: brn.BatchRenorm1d, 4: brn.BatchRenorm2d, 5: brn.BatchRenorm3d}
CLIPPING = {"r_max": 1.3, "d_max": 0.2, "hold": 1, "r_ramp": 2, "d_ramp": 1}  # closed, half open, open in three steps


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(x):
    return torch.stack([x, x], -1)[..., 0]


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last, "strided": every_other}


def compare_steps(
    shape, dtype, device, *, limits=CLIPPING, activation=None, residual=False, mask=False, affine=True, bias=True,
    momentum=0.1, layout="contiguous", dy_layout="contiguous", steps=3, seed=0, spread=1.0,
):  # fmt: skip
    """Train a layer and the oracle on the same values; returns the layer, the oracle and which way r and d clipped."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    schedule = brn.ClipSchedule(**limits)
    layer = LAYERS[len(shape)](
        shape[1], momentum=momentum, affine=affine, bias=bias, schedule=schedule, activation=activation,
        device=device, dtype=dtype,
    )  # fmt: skip
    oracle = Oracle(shape[1], momentum=momentum, activation=activation, **limits)
    if affine:
        with torch.no_grad():
            layer.weight.copy_(1 + 0.3 * normal(shape[1]))
            oracle.weight = layer.weight.detach().cpu().double().requires_grad_()
            if bias:
                layer.bias.copy_(normal(shape[1]))
                oracle.bias = layer.bias.detach().cpu().double().requires_grad_()
    sides = set()
    for step in range(steps):
        scale = 1 + spread * torch.rand(shape[1], generator=generator, dtype=torch.float64) * (-0.9 if step % 2 else 2)
        shift = normal(shape[1]).double() * spread
        per_channel = [1, -1] + [1] * (len(shape) - 2)
        values = normal(*shape).double() * scale.view(per_channel) + shift.view(per_channel)
        x = LAYOUTS[layout](values.to(dtype).to(device)).requires_grad_()
        x64 = x.detach().cpu().double().contiguous().requires_grad_()
        extra = LAYOUTS[layout](normal(*shape).to(device)).requires_grad_() if residual else None
        extra64 = extra.detach().cpu().double().contiguous().requires_grad_() if residual else None
        valid = torch.rand(shape[0], *shape[2:], generator=generator) < 0.7 if mask else None
        if mask:
            valid.view(-1)[:2] = True  # statistics need two values
        dy = LAYOUTS[dy_layout](normal(*shape).to(device))

        y = layer(x, extra, None if valid is None else valid.to(device))
        y64 = oracle(x64, extra64, None if valid is None else valid.unsqueeze(1))
        layer.zero_grad()
        y.backward(dy)
        if affine:
            oracle.weight.grad = None
            if bias:
                oracle.bias.grad = None
        y64.backward(dy.cpu().double())

        assert y.dtype == dtype
        assert y.stride() == torch.empty_like(x).stride()
        pairs = {"y": (y, y64), "dx": (x.grad, x64.grad)}
        pairs |= {"running_mean": (layer.running_mean, oracle.running_mean)}
        pairs |= {"running_var": (layer.running_var, oracle.running_var)}
        if residual:
            pairs |= {"dresidual": (extra.grad, extra64.grad)}
        if affine:
            pairs |= {"dweight": (layer.weight.grad, oracle.weight.grad)}
            if bias:
                pairs |= {"dbias": (layer.bias.grad, oracle.bias.grad)}
        scales = oracle.scales(y64, dy, x64)
        for name, (ours, truth) in pairs.items():
            assert_close(ours.cpu(), truth, f"{name} at step {step}", scales.get(name, 1.0))
        assert layer.num_batches_tracked.item() == oracle.t
        assert torch.equal(layer.clipped.cpu(), oracle.clipped)
        r_max, d_max = Oracle.limits(Oracle(1, **limits, t=step))
        sides |= {"r up"} if (oracle.r == r_max).any() and r_max > 1 else set()
        sides |= {"r down"} if (oracle.r == 1 / r_max).any() and r_max > 1 else set()
        sides |= {"d up"} if (oracle.d == d_max).any() and d_max > 0 else set()
        sides |= {"d down"} if (oracle.d == -d_max).any() and d_max > 0 else set()
    return sides


SHAPES = [
    (5, 3),  # no positions
    (2, 3),  # two values a channel, the fewest
    (1, 3, 2),  # likewise, of one sample
    (3, 5, 7),
    (4, 8, 3, 3),
    (2, 1, 6, 5),  # one channel: contiguous and channels_last at once
    (2, 3, 2, 3, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_three_steps_equal_the_oracle(backend, device, shape, dtype):
    compare_steps(shape, dtype, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dy_layout", LAYOUTS)
def test_memory_formats_of_input_and_gradient_may_differ(backend, device, layout, dy_layout):
    for shape in [(3, 5, 7), (2, 8, 3, 5), (2, 3, 2, 3, 2)]:
        compare_steps(shape, torch.float64, device, layout=layout, dy_layout=dy_layout, residual=True, steps=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_activation_and_residual(backend, device, activation, residual, layout):
    compare_steps((3, 9, 4, 3), torch.float64, device, activation=activation, residual=residual, layout=layout, steps=2)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_mask(backend, device, activation, residual):
    for shape in [(6, 3), (3, 2, 9), (2, 3, 4, 4)]:
        compare_steps(shape, torch.float64, device, activation=activation, residual=residual, mask=True)


@pytest.mark.parametrize("affine, bias", [(False, False), (True, False)])
def test_without_affine_or_bias(backend, device, affine, bias):
    compare_steps((3, 4, 5), torch.float64, device, affine=affine, bias=bias, activation="relu")


def test_cumulative_average(backend, device):
    compare_steps((3, 4, 5), torch.float64, device, momentum=None, steps=4)


def test_both_clips_fire_on_both_sides(backend, device):
    fired = compare_steps((4, 16, 3, 3), torch.float64, device, limits=CLIPPING | {"hold": 0, "r_ramp": 0, "d_ramp": 0})
    assert fired == {"r up", "r down", "d up", "d down"}


def test_never_clipped(backend, device):
    wide = {"r_max": 1e6, "d_max": 1e6, "hold": 0, "r_ramp": 0, "d_ramp": 0}
    assert compare_steps((4, 5, 3, 3), torch.float64, device, limits=wide) == set()


def test_far_past_the_ramp(backend, device):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = brn.BatchRenorm2d(3, schedule=brn.ClipSchedule(1.5, 0.3, 5, 7, 3), dtype=torch.float64, device=device)
    layer.num_batches_tracked.fill_(10**12)
    oracle = Oracle(3, r_max=1.5, d_max=0.3, t=10**12)
    assert_close(layer(x.to(device) * 9).cpu(), oracle(x * 9))
    assert layer.num_batches_tracked.item() == 10**12 + 1


def test_expanded_input(backend, device):
    row = torch.randn(1, 4, 1, 6, dtype=torch.float64, device=device)
    x = row.expand(3, 4, 5, 6)
    layer = brn.BatchRenorm2d(4, dtype=torch.float64, device=device, schedule=brn.ClipSchedule.constant(2, 1))
    oracle = Oracle(4, r_max=2, d_max=1)
    assert_close(layer(x).cpu(), oracle(x.cpu().contiguous()))


def test_x_as_its_own_residual(backend, device):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    ours = x.to(device, copy=True).requires_grad_()
    theirs = x.clone().requires_grad_()
    layer = brn.BatchRenorm1d(3, dtype=torch.float64, activation="relu", device=device)
    layer.schedule = brn.ClipSchedule.constant(2, 1)
    dy = torch.randn_like(x)
    layer(ours, ours).backward(dy.to(device))
    Oracle(3, r_max=2, d_max=1, activation="relu")(theirs, theirs).backward(dy)
    assert_close(ours.grad.cpu(), theirs.grad)


def test_memory_of_the_input_is_not_written(backend, device):
    x = torch.randn(4, 3, 5, device=device)
    before = x.clone()
    y = brn.BatchRenorm1d(3, device=device)(x)
    assert torch.equal(x, before)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 5), c=st.integers(1, 20), spatial=st.lists(st.integers(1, 6), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]), layout=st.sampled_from(sorted(LAYOUTS)),
    activation=st.sampled_from(list(ACTIVATIONS)), residual=st.booleans(), affine=st.booleans(), bias=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(backend, device, n, c, spatial, dtype, layout, activation, residual, affine, bias, seed):
    values = n
    for size in spatial:
        values *= size
    if values < 2:
        return
    compare_steps(
        (n, c, *spatial), dtype, device, layout=layout, activation=activation, residual=residual, affine=affine,
        bias=bias, seed=seed, steps=2,
    )  # fmt: skip
