"""``ClipSchedule.auto()``: limits that follow each channel's own statistics; what a layer keeps for them."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn
from brn_kernels.backends import auto_limits
from brn_kernels.functional import renormalize

AUTO = brn.ClipSchedule.auto()
SEEN = auto_limits.MIN_BATCHES


def layer_of(channels=3, device="cpu", dtype=torch.float64, **keywords):
    keywords = {"schedule": AUTO, "momentum": 0.1} | keywords
    return brn.BatchRenorm2d(channels, **keywords).to(device=device, dtype=dtype)


def batch(step, size=4, channels=3, dtype=torch.float64, scale=2.0, shift=1.0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, channels, 5, 2, generator=generator, dtype=torch.float64).to(dtype) * scale + shift


def train(layer, steps, start=0, **keywords):
    x = [batch(step, **keywords) for step in range(start, start + steps)]
    return [layer(each.to(device=layer.running_mean.device, dtype=layer.running_mean.dtype)) for each in x]


class ByHand:
    """One channel, in Python floats, from the formulas of docs/auto-schedule.md."""

    def __init__(self, momentum=0.1, eps=1e-5):
        self.mean, self.var, self.momentum, self.eps = 0.0, 1.0, momentum, eps
        self.means, self.log_stds = [], []
        self.noise_d = self.noise_r = 0.0

    def limits(self):
        if len(self.means) < 10:
            return 1.0, 0.0
        return math.exp(2 * math.sqrt(self.noise_r)), 2 * math.sqrt(self.noise_d)

    def step(self, values):
        """R and d of a batch, from the limits before it."""
        m = len(values)
        mean = sum(values) / m
        var = sum((v - mean) ** 2 for v in values) / m
        std, sigma = math.sqrt(var + self.eps), math.sqrt(self.var + self.eps)
        r_max, d_max = self.limits()
        r = min(max(std / sigma, 1 / r_max), r_max)
        d = min(max((mean - self.mean) / sigma, -d_max), d_max)
        if self.means:
            rate = max(1 / len(self.means), 0.02)
            self.noise_d += rate * ((mean - self.means[-1]) ** 2 / (2 * sigma**2) - self.noise_d)
            self.noise_r += rate * ((math.log(std) - self.log_stds[-1]) ** 2 / 2 - self.noise_r)
        self.means.append(mean)
        self.log_stds.append(math.log(std))
        t = len(self.means) - 1
        momentum = max(self.momentum, 3 / (t + 3))
        self.mean += momentum * (mean - self.mean)
        self.var += momentum * (var * m / (m - 1) - self.var)
        return r, d


@pytest.mark.many_steps
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-4)], ids=str)
def test_limits_and_output_equal_those_by_hand(backend, device, dtype, tolerance):
    layer, channels = layer_of(2, device, dtype), [ByHand(), ByHand()]
    for step in range(80):
        x = batch(step, channels=2, dtype=dtype, scale=1 + step / 40, shift=math.sin(step / 9)).to(device)
        expected = torch.tensor([hand.limits() for hand in channels], dtype=torch.float64).T
        torch.testing.assert_close(
            torch.stack(layer.auto_limits()).double().cpu(), expected, rtol=tolerance, atol=tolerance
        )
        y = layer(x).double().cpu()
        x = x.double().cpu()
        for c, hand in enumerate(channels):
            values = x[:, c].flatten()
            r, d = hand.step(values.tolist())
            truth = (x[:, c] - values.mean()) / (values.var(correction=0) + 1e-5).sqrt() * r + d
            torch.testing.assert_close(y[:, c], truth, rtol=tolerance * 10, atol=tolerance * 10)
    assert layer.auto_state[auto_limits.COUNT].tolist() == [80, 80]
    assert expected[0].min() > 1.05 and expected[1].min() > 0.1, "the limits have to be open for this to show anything"


@pytest.mark.many_steps
def test_running_statistics_forget_what_they_start_with(backend, device):
    short = layer_of(device=device, momentum=0.01)
    x = batch(0).to(device)
    short(x)
    torch.testing.assert_close(short.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(short.running_var, x.var((0, 2, 3)))
    short.num_batches_tracked.fill_(297)  # a checkpoint's: 3 / (297 + 3) is the momentum
    before = short.running_mean.clone()
    short(x + 10)
    torch.testing.assert_close(short.running_mean, before + 0.01 * (x.mean((0, 2, 3)) + 10 - before))


@pytest.mark.many_steps
@pytest.mark.parametrize("momentum, expected", [(0.0, 0.0), (None, 1.5)])
def test_frozen_and_averaged_statistics_stay_so(backend, device, momentum, expected):
    layer = layer_of(device=device, momentum=momentum)
    for value in (1.0, 2.0):
        layer(batch(0).to(device) * 1e-3 + value)
    assert layer.running_mean.mean().item() == pytest.approx(expected, abs=1e-2)


def test_the_limits_are_closed_until_enough_has_been_seen(device):
    layer = layer_of(device=device)
    for step in range(SEEN):
        assert torch.equal(torch.stack(layer.auto_limits()), torch.tensor([[1.0] * 3, [0.0] * 3]).to(layer.auto_state))
        train(layer, 1, step)
    r_max, d_max = layer.auto_limits()
    assert (r_max > 1).all() and (d_max > 0).all()


@pytest.mark.parametrize("size", [2, 8, 32])
def test_a_stationary_stream_opens_to_its_noise(device, size):
    """The mean of m independent values has a standard deviation of 1/sqrt(m), log of theirs of about 1/sqrt(2 m)."""
    layer, m = layer_of(64, device), size * 10
    train(layer, 400, size=size, channels=64)
    r_max, d_max = layer.auto_limits()
    assert d_max.mean().item() == pytest.approx(2 / math.sqrt(m), rel=0.1)
    assert r_max.log().mean().item() == pytest.approx(2 / math.sqrt(2 * m), rel=0.1)


def test_a_drift_does_not_open_the_limits(device):
    """The running mean lags by 50 steps' drift, what one step moves is small beside the noise: it is all clipped."""
    still, drifting = layer_of(device=device, momentum=0.02), layer_of(device=device, momentum=0.02)
    for step in range(400):
        x = batch(step, size=32).to(device)
        still(x)
        drifting(x + 0.05 * step)
    lag = (drifting.running_mean - (1 + 0.05 * 399)) / drifting.running_var.sqrt()
    assert (lag < -0.5).all() and drifting.clipped.all()
    assert (drifting.auto_limits()[1] < 1.2 * still.auto_limits()[1]).all()
    assert (drifting.auto_limits()[1] < 0.2).all()


@pytest.mark.many_steps
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite_leaves_its_state(backend, device, bad):
    layer = layer_of(device=device)
    train(layer, 12)
    before, x = layer.auto_state.clone(), batch(12).to(device)
    x[1, 2, 0, 0] = bad
    layer(x)
    assert torch.equal(layer.auto_state[:, 2], before[:, 2])
    assert (layer.auto_state[auto_limits.COUNT, :2] == 13).all()


def test_masked_values_stay_out(device):
    masked, cut = layer_of(device=device), layer_of(device=device)
    for step in range(14):
        x = batch(step).to(device)
        mask = torch.ones(4, 5, 2, dtype=torch.bool, device=device)
        mask[2:] = False
        cut(x[:2])
        x[2:] = float("nan")
        masked(x, mask=mask)
    torch.testing.assert_close(masked.auto_state, cut.auto_state, rtol=1e-10, atol=1e-12)


@pytest.mark.many_steps
def test_batches_of_one_value_or_none_leave_the_state(backend, device):
    layer = layer_of(device=device)
    train(layer, 12)
    before, mask = layer.auto_state.clone(), torch.zeros(4, 5, 2, dtype=torch.bool, device=device)
    layer(torch.empty(0, 3, 5, 2, dtype=torch.float64, device=device))
    layer(batch(12).to(device), mask=mask)
    mask[0, 0, 0] = True
    layer(batch(12).to(device), mask=mask)
    assert torch.equal(layer.auto_state, before) and layer.num_batches_tracked == 15


def test_evaluation_leaves_the_state(device):
    layer = layer_of(device=device)
    train(layer, 12)
    before = layer.auto_state.clone()
    train(layer.eval(), 2)
    assert torch.equal(layer.auto_state, before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_training_is_the_same(backend, device, use_reentrant):
    plain = layer_of(device=device)
    train(plain, 14)
    checkpointed = copy.deepcopy(plain)
    for step in range(14, 17):
        gradients = []
        for run in (plain, lambda x: checkpoint(checkpointed, x, use_reentrant=use_reentrant)):
            x = batch(step, scale=3, shift=5).to(device).requires_grad_()
            run(x).sin().sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.equal(plain.auto_state, checkpointed.auto_state)
    assert (plain.auto_state[auto_limits.COUNT] == 17).all()


def test_recomputed_outputs_are_the_same_bits(backend, device):
    plain = layer_of(device=device, dtype=torch.float32, activation="relu")
    train(plain, 14, dtype=torch.float32)
    other, gradients = copy.deepcopy(plain), []
    convolution = nn.Conv2d(3, 2, 1, device=device)
    for recomputing in (False, True):
        x = batch(14, dtype=torch.float32).to(device).requires_grad_()
        if recomputing:
            with brn.recompute_activations():
                loss = convolution(other(x)).square().sum()
        else:
            loss = convolution(plain(x)).square().sum()
        loss.backward()
        gradients.append([x.grad, convolution.weight.grad])  # the latter is of the output
        convolution.weight.grad = None
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))


def test_compiled_without_breaks_or_recompilation(backend, device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(3, 3, 1), layer_of(dtype=torch.float32)).to(device)
    copied = copy.deepcopy(eager)
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copied, fullgraph=True, backend=count)
    for step in range(SEEN + 3):
        for run in (eager, compiled):
            run(batch(step, dtype=torch.float32).to(device)).square().sum().backward()
    assert count.frame_count == 1
    for ours, theirs in zip(eager[1].state_dict().values(), copied[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(eager[0].weight.grad, copied[0].weight.grad)
    assert (copied[1].auto_state[auto_limits.COUNT] == SEEN + 3).all()


def test_under_function_transforms(device):
    layer = layer_of(device=device)
    train(layer, 14)
    plain, x = copy.deepcopy(layer), batch(14).to(device)
    buffers = {name: value.clone() for name, value in layer.named_buffers()}

    def loss(parameters, buffers, x):
        return torch.func.functional_call(layer, (parameters, buffers), (x,)).sin().sum()

    gradient = torch.func.grad(loss)(dict(layer.named_parameters()), buffers, x)
    plain(x).sin().sum().backward()
    torch.testing.assert_close(gradient["weight"], plain.weight.grad)
    torch.testing.assert_close(buffers["auto_state"], plain.auto_state)  # the transform's is the reference's


def test_the_operator_declares_what_it_updates(device):
    schema = torch.ops.brn_kernels.forward.default._schema
    (argument,) = [each for each in schema.arguments if each.name == "auto_state"]
    assert argument.alias_info is not None and argument.alias_info.is_write
    layer = layer_of(device=device, dtype=torch.float32)
    train(layer, 12, dtype=torch.float32)
    arguments = (
        batch(0, dtype=torch.float32).to(device), None, None, layer.weight.detach(), layer.bias.detach(),
        layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.clipped, None, list(AUTO.numbers), 0.1,
        1e-5, None, "reference", False, None, None, layer.auto_state,
    )  # fmt: skip
    library.opcheck(torch.ops.brn_kernels.forward.default, arguments)


@pytest.mark.parametrize("fault", ["rows", "channels", "dtype", "device"])
def test_a_bad_state_changes_nothing(device, fault):
    layer = layer_of(device=device)
    train(layer, 12)
    bad = {
        "rows": layer.auto_state[:-1], "channels": layer.auto_state[:, :2], "dtype": layer.auto_state.half(),
        "device": layer.auto_state.to("meta"),
    }[fault]  # fmt: skip
    layer._buffers["auto_state"] = bad
    before = {name: value.clone() for name, value in layer.named_buffers()}
    with pytest.raises(ValueError, match="auto_state"):
        train(layer, 1)
    for name, value in layer.named_buffers():
        assert fault == "device" or torch.equal(value, before[name])
    assert layer.num_batches_tracked == 12


def test_there_are_no_limits_by_steps():
    for step in (0, torch.tensor(3)):
        with pytest.raises(ValueError, match="no limits that depend on the step"):
            AUTO.limits(step)
    assert repr(AUTO) == "ClipSchedule.auto()" and AUTO == brn.ClipSchedule.auto() != brn.ClipSchedule.batchnorm()
    assert pickle.loads(pickle.dumps(AUTO)) == AUTO
    with pytest.raises(ValueError, match="schedule must be"):
        brn.BatchRenorm2d(3).schedule = "auto"


def test_the_function_takes_no_state_by_accident(device):
    """Without a state, automatic limits' numbers are closed."""
    x = batch(0).to(device)
    statistics = [torch.ones(3, dtype=x.dtype, device=device) for _ in range(2)]
    y = renormalize(
        x, None, None, None, None, *statistics, None, None, None, AUTO.numbers, 0.1, 1e-5, None, True
    )  # fmt: skip
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros_like(statistics[0]), atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), size=st.integers(2, 6), steps=st.integers(1, 25),
    momentum=st.sampled_from([0.01, 0.3, None]),
)  # fmt: skip
def test_limits_are_finite_in_range_and_of_no_unit(scale, shift, size, steps, momentum):
    """What follows the running statistics is relative to them: other units, the same limits."""
    plain, other = layer_of(eps=1e-12, momentum=momentum), layer_of(eps=1e-12, momentum=momentum)
    other.running_var.fill_(scale**2)
    other.running_mean.fill_(shift * scale)
    for step in range(steps):
        x = batch(step, size=size)
        plain(x)
        other((x + shift) * scale)
    limits = torch.stack(plain.auto_limits())
    assert limits.isfinite().all() and (limits[0] >= 1).all() and (limits[1] >= 0).all()
    if momentum is not None:  # the cumulative average forgets the values given above
        torch.testing.assert_close(torch.stack(other.auto_limits()), limits, rtol=1e-5, atol=1e-6)
