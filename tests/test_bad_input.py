"""Every wrong call names the argument, what was expected and what it got, and changes nothing."""

import math

import pytest
import torch

import brn_kernels as brn

X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))


def state_of(layer):
    return {name: value.clone() for name, value in layer.named_buffers()} | {
        name: value.detach().clone() for name, value in layer.named_parameters()
    }


def assert_unchanged(layer, before):
    for name, value in state_of(layer).items():
        assert torch.equal(value, before[name]), name


def trained(layer):
    with torch.no_grad():
        layer(torch.randn(8, 3, *[4] * (layer_rank(layer) - 2), dtype=layer.weight.dtype))
    return layer


def layer_rank(layer):
    return {"BatchRenorm1d": 3, "BatchRenorm2d": 4, "BatchRenorm3d": 5}[type(layer).__name__]


BAD_CALLS = {
    "rank of 1d": (brn.BatchRenorm1d, [torch.zeros(4, 3, 2, 2)], r"expected 2D or 3D input \(got 4D input\)"),
    "rank of 2d": (brn.BatchRenorm2d, [torch.zeros(4, 3, 2)], r"expected 4D input \(got 3D input\)"),
    "rank of 3d": (brn.BatchRenorm3d, [torch.zeros(4, 3, 2, 2)], r"expected 5D input \(got 4D input\)"),
    "channels": (brn.BatchRenorm1d, [torch.zeros(4, 5)], r"weight: expected shape \(5,\).*got \(3,\)"),
    "integers": (brn.BatchRenorm1d, [torch.zeros(4, 3, dtype=torch.long)], "x: expected float.*got torch.int64"),
    "complex": (brn.BatchRenorm1d, [torch.zeros(4, 3, dtype=torch.cfloat)], "x: expected float.*got torch.complex64"),
    "dtype": (brn.BatchRenorm1d, [torch.zeros(4, 3).double()], "weight: expected torch.float64.*got torch.float32"),
    "residual shape": (brn.BatchRenorm1d, [X, X[:2]], r"residual: expected.*\(4, 3, 5\), got \(2, 3, 5\)"),
    "residual dtype": (brn.BatchRenorm1d, [X, X.half()], "residual: expected.*torch.float32, got torch.float16"),
    "residual device": (brn.BatchRenorm1d, [X, X.to("meta")], "residual: expected.* on cpu as x, got one on meta"),
    "mask shape": (brn.BatchRenorm1d, [X, None, torch.ones(4, 4).bool()], r"mask: expected.*\(4, 5\).*got \(4, 4\)"),
    "mask of every channel": (brn.BatchRenorm1d, [X, None, X > 0], r"mask: expected.*\(4, 1, 5\).*got \(4, 3, 5\)"),
    "mask dtype": (brn.BatchRenorm1d, [X, None, torch.ones(4, 5)], "mask: expected torch.bool, got torch.float32"),
    "mask device": (
        brn.BatchRenorm1d, [X, None, torch.ones(4, 5, device="meta").bool()], "mask: expected a tensor on cpu",
    ),
    "x on another device": (brn.BatchRenorm1d, [X.to("meta")], "weight: expected.* on meta as x, got one on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_of_a_layer(case, training):
    make, arguments, message = BAD_CALLS[case]
    layer = trained(make(3)).train(training)
    before = state_of(layer)
    with pytest.raises(ValueError, match=message):
        layer(*arguments)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=str)
def test_one_value_per_channel_in_training(shape):
    layer = trained(brn.BatchRenorm1d(3))
    before = state_of(layer)
    with pytest.raises(ValueError) as ours:
        layer(torch.zeros(shape))
    with pytest.raises(ValueError) as torchs:
        torch.nn.BatchNorm1d(3)(torch.zeros(shape))
    assert str(ours.value) == str(torchs.value)
    assert_unchanged(layer, before)
    assert layer.eval()(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, r"x: expected 2 or more dimensions"),
        ({"running_mean": torch.zeros(2)}, r"running_mean: expected shape \(3,\).*got \(2,\)"),
        ({"running_var": torch.zeros(3, 1)}, r"running_var: expected shape \(3,\).*got \(3, 1\)"),
        ({"running_var": torch.zeros(3).double()}, "running_var: expected torch.float32.*got torch.float64"),
        ({"running_var": None}, "running_mean and running_var: expected both or neither"),
        ({"running_mean": None, "running_var": None, "training": False}, "in evaluation mode, got None"),
        ({"weight": torch.ones(4)}, r"weight: expected shape \(3,\).*got \(4,\)"),
        ({"bias": torch.ones(3, device="meta")}, "bias: expected a tensor on cpu as x, got one on meta"),
        ({"momentum": math.nan}, "momentum must be a finite number"),
        ({"momentum": None}, "momentum must be a finite number"),
        ({"eps": 0.0}, "eps must be a positive"),
        ({"eps": math.inf}, "eps must be a positive"),
        ({"r_max": 0.5}, "r_max must be a number of at least 1, got 0.5"),
        ({"d_max": -1.0}, "d_max must be a number of at least 0, got -1.0"),
        ({"r_max": torch.ones(1)}, r"r_max must be a float or a 0-d tensor.*\(1,\)"),
        ({"d_max": torch.ones((), device="meta")}, "d_max: expected a tensor on cpu"),
        ({"r_max": torch.ones(()), "d_max": -1.0}, "d_max must be"),
        ({"activation": "gelu"}, "activation must be one of .*'silu'.*got 'gelu'"),
        ({"activation": ["relu"]}, "activation must be one of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_call_of_the_function(change, message):
    arguments = {"x": X, "running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": True} | change
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    with pytest.raises(ValueError, match=message):
        brn.batch_renorm(**arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty_batch(backend, device, shape, activation):
    layer = brn.BatchRenorm1d(3, activation=activation, device=device)
    torchs = torch.nn.BatchNorm1d(3, device=device)
    before = state_of(layer)
    x = torch.zeros(shape, device=device, requires_grad=True)
    residual = torch.zeros(shape, device=device, requires_grad=True)
    y = layer(x, residual)
    torchs(torch.zeros(shape, device=device))
    assert y.shape == shape and y.dtype == x.dtype
    y.backward(torch.ones_like(y))
    assert x.grad.shape == residual.grad.shape == shape
    assert torch.equal(layer.weight.grad, torch.zeros(3, device=device))
    assert torch.equal(layer.bias.grad, torch.zeros(3, device=device))
    assert layer.num_batches_tracked == torchs.num_batches_tracked == 1
    assert_unchanged_statistics(layer, before)
    assert layer.eval()(x).shape == shape


def assert_unchanged_statistics(layer, before):
    assert torch.equal(layer.running_mean, before["running_mean"])
    assert torch.equal(layer.running_var, before["running_var"])
    assert torch.equal(layer.clipped, before["clipped"])


@pytest.mark.parametrize("valid", [0, 1])
def test_mask_that_leaves_no_variance(backend, device, valid):
    """One valid value or none: no NaN anywhere, statistics as before."""
    layer = brn.BatchRenorm1d(3, schedule=brn.ClipSchedule.constant(2, 1), device=device)
    layer(torch.randn(4, 3, 5, device=device))
    before = state_of(layer)
    mask = torch.zeros(4, 5, dtype=torch.bool, device=device)
    mask.view(-1)[:valid] = True
    x = torch.full((4, 3, 5), math.nan, device=device)  # padding may hold anything
    x[0, :, 0] = 3.0
    x.requires_grad_()
    y = layer(x, mask=mask)
    y.backward(torch.randn_like(y))
    assert (y[~mask.unsqueeze(1).expand_as(y)] == 0).all()
    assert (x.grad[~mask.unsqueeze(1).expand_as(y)] == 0).all()
    assert y.isfinite().all() and x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    assert_unchanged_statistics(layer, before)


def test_what_is_masked_does_not_matter(backend, device):
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0, :2] = True
    found = []
    for padding in (0.0, 1e30, math.nan, math.inf):
        layer = brn.BatchRenorm1d(3, activation="relu", device=device)
        x = torch.where(mask[:, None], X, padding).to(device).requires_grad_()
        y = layer(x, mask=mask.to(device))
        y.backward(X.to(device))
        found.append([y, x.grad, layer.running_mean, layer.running_var, layer.weight.grad])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_both_mask_shapes_mean_the_same(backend, device):
    mask = (torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6).to(device)
    layers = [brn.BatchRenorm1d(3, device=device) for _ in range(2)]
    assert torch.equal(layers[0](X.to(device), mask=mask), layers[1](X.to(device), mask=mask.unsqueeze(1)))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("schedule", [brn.ClipSchedule.batchnorm(), brn.ClipSchedule.constant(3, 5)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_channel_that_overflowed_spares_its_statistics(backend, device, poison, schedule, momentum):
    layer = brn.BatchRenorm1d(3, schedule=schedule, momentum=momentum, device=device)
    clean = brn.BatchRenorm1d(3, schedule=schedule, momentum=momentum, device=device)
    for _ in range(2):
        before = state_of(layer)
        x = X.to(device, copy=True)
        x[2, 1, 3] = poison
        y, expected = layer(x), clean(X.to(device))
        assert y[:, 1].isnan().any()
        assert torch.equal(y[:, [0, 2]], expected[:, [0, 2]])
        assert layer.clipped[1]
        for name in ("running_mean", "running_var"):
            after = getattr(layer, name)
            assert after[1] == before[name][1]
            assert torch.equal(after[[0, 2]], getattr(clean, name)[[0, 2]])
    assert layer.num_batches_tracked == 2


def test_values_whose_squares_overflow_spare_the_variance(backend, device):
    layer = brn.BatchRenorm1d(1, device=device)
    layer(torch.tensor([[1e30], [-1e30]], device=device))
    assert layer.running_var.item() == 1


@pytest.mark.parametrize("schedule", [brn.ClipSchedule.batchnorm(), brn.ClipSchedule.constant(3, 5)], ids=str)
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_channel(backend, device, schedule, value):
    layer = brn.BatchRenorm1d(2, schedule=schedule, momentum=0.5, device=device)
    for _ in range(60):  # until the running variance is next to nothing
        x = torch.full((4, 2, 3), value, device=device, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        assert y.isfinite().all() and x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    assert layer.running_var.max() < 1e-6 and layer.running_mean[0].item() == pytest.approx(value, abs=1e-5)


def test_a_variance_that_overflows_spares_the_mean_too(backend, device):
    """Half an update would leave a mean and a variance that belong to different steps."""
    layer = brn.BatchRenorm1d(2, momentum=0.5, device=device)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= 1e30  # finite, and so is its mean; its variance is no float32
    layer(x.to(device))
    assert layer.running_mean[0] != 0 and layer.running_var[0] != 1
    assert layer.running_mean[1] == 0 and layer.running_var[1] == 1
    assert layer.clipped.tolist()[1] is True


def test_limits_that_float32_cannot_hold():
    with pytest.raises(ValueError, match="r_max must be infinite or fit float32, got 1e[+]39"):
        brn.ClipSchedule(r_max=1e39)


def test_running_statistics_of_two_dtypes():
    x = torch.randn(4, 3).half()
    for training in (True, False):
        with pytest.raises(
            ValueError, match="running_var: expected running_mean's dtype torch.float16, got torch.float32"
        ):
            brn.batch_renorm(x, torch.zeros(3).half(), torch.ones(3), training=training)
