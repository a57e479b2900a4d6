"""Forwards in C++: which calls they are, and that all others are Python's, its errors included."""

import copy
import functools
from unittest import mock

import pytest
import torch
from node_calls import asked, at_once, compared, in_python, is_in_cpp, laid_out, made
from torch import nn

import brn_kernels as brn
from brn_kernels import node, observe

pytestmark = pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`")


@pytest.fixture(autouse=True)
def native():
    with brn.use_backend("native"):
        yield


def test_the_forward_interprets_no_kernels_in_python():
    layer, x, extra, _ = made(residual=True, activation="relu")
    layer(x, extra)
    refuse = mock.Mock(side_effect=AssertionError)
    with (
        mock.patch("brn_kernels.backends.native.forward", refuse),
        mock.patch("brn_kernels.functional._check_tensors", refuse),
        mock.patch.object(node, "prepare", refuse),
    ):
        assert is_in_cpp(layer(x, extra))


@pytest.fixture
def planned():
    """A layer and its inputs, whose calls are C++'s; ``changed()`` says whether any buffer has changed since."""
    layer, *inputs = made(residual=True)
    assert is_in_cpp(layer(*inputs[:2]))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def changed():
        return any(not torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())

    return layer, *inputs, changed


BAD = {
    "weight": (torch.ones(5), "weight: expected shape"),
    "bias": (torch.ones(6, dtype=torch.float16), "bias: expected torch.float32"),
    "running_mean": (torch.ones(6, device="meta"), "running_mean: expected a tensor on cpu"),
    "running_var": (torch.ones(6, dtype=torch.float64), "running_var: expected torch.float32"),
    "num_batches_tracked": (torch.tensor(0, device="meta"), "num_batches_tracked: expected a tensor"),
    "clipped": (torch.zeros(6, dtype=torch.bool, device="meta"), "clipped: expected a tensor on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_as_ever(planned, name):
    layer, x, extra, _, _ = planned
    wrong, message = BAD[name]
    if name in layer._buffers:
        layer._buffers[name] = wrong
    else:
        layer._parameters[name] = nn.Parameter(wrong)
    with pytest.raises(ValueError, match=message):
        layer(x, extra)


def test_inputs_that_are_wrong_change_nothing(planned):
    layer, x, extra, _, changed = planned
    with pytest.raises(ValueError, match="residual: expected x's shape"):
        layer(x, extra[:1])
    with pytest.raises(ValueError, match="residual: expected x's dtype"):
        layer(x, extra.double())
    with pytest.raises(ValueError, match="x: expected float16"):
        layer(x.detach().long(), extra)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x[:1, :, :1, :1], extra[:1, :, :1, :1])
    with pytest.raises(ValueError, match="expected shape"):
        layer(x[:, :5], extra[:, :5])
    assert not changed()


class Subclass(torch.Tensor):
    pass


def test_what_is_not_ordinary_is_pythons(planned):
    layer, x, extra, _, _ = planned

    def seen():
        assert is_in_cpp(layer(x, extra))
        return layer(x, extra)

    seen()
    with torch.no_grad():
        assert layer(x, extra).grad_fn is None
    with torch.inference_mode():
        assert layer(x, extra).grad_fn is None
    with torch.autograd.graph.save_on_cpu():
        assert not is_in_cpp(layer(x, extra))
    with torch.autograd.forward_ad.dual_level():
        assert not is_in_cpp(layer(x, extra))
    observe.observers.append(mock.Mock(begin=mock.Mock(return_value=None)))
    try:
        assert not is_in_cpp(layer(x, extra))
        assert observe.observers[0].begin.called
    finally:
        observe.observers.clear()
    assert not is_in_cpp(layer(x.as_subclass(Subclass), extra))
    assert not is_in_cpp(layer(x, extra.as_subclass(Subclass)))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclass))
    assert not is_in_cpp(layer(x, extra))
    layer.weight = nn.Parameter(torch.ones(6))
    layer.eval()
    assert not is_in_cpp(layer(x, extra))
    layer.train()
    seen()


def test_momentum_and_eps_of_other_kinds():
    import numpy

    layer, x, _, _ = made()
    assert is_in_cpp(layer(x))
    for momentum, in_cpp in ((1, True), (numpy.float64(0.5), True), (numpy.float32(0.5), False), (None, True)):
        layer.momentum = momentum
        other = copy.deepcopy(layer)
        y = layer(x)
        with in_python():
            assert torch.equal(y, other(x)) and torch.equal(layer.running_var, other.running_var)
        assert is_in_cpp(y) == in_cpp
    layer.eps = 1e-2
    other = copy.deepcopy(layer)
    y = layer(x)
    with in_python():
        assert is_in_cpp(y) and torch.equal(y, other(x))


def test_statistics_with_gaps_are_written_where_they_are():
    layer, x, _, _ = made()
    layer(x)
    wide = torch.zeros(6, 2)
    mean, var = torch.zeros(6), torch.ones(6)
    y = brn.batch_renorm(x, wide[:, 0], var, training=True)
    z = brn.batch_renorm(x, mean, torch.ones(6), training=True)
    assert torch.equal(wide[:, 0], mean) and mean.any() and torch.equal(y, z)


@pytest.mark.parametrize("counter", [torch.tensor([3]), torch.tensor(3, dtype=torch.int32)])
def test_counters_of_other_shapes_and_kinds(counter):
    layer, x, _, _ = made()
    layer(x)
    layer._buffers["num_batches_tracked"] = counter.clone()
    other = copy.deepcopy(layer)

    def result(layer):
        try:
            return layer(x), layer.num_batches_tracked
        except RuntimeError as error:
            return str(error)

    found = result(layer)
    with in_python():
        expected = result(other)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))


def test_arguments_are_counted():
    layer, x, _, _ = made()
    layer(x)
    plans = node._plans["native"]
    with pytest.raises(TypeError, match="arguments of a call"):
        node.module().forward(plans, x)
    with pytest.raises(ValueError):
        node.module().forward(object(), *[None] * 14)
    assert node.module().forward(plans, *[None] * 14) is None
    with pytest.raises(TypeError):
        node.module().prepare(plans, (x,), None)


def test_a_backend_that_is_chosen_meanwhile_is_the_next_calls():
    """The call was given ``NotImplemented`` for y, or a KeyError."""
    prepare = node.prepare

    def chosen_meanwhile(*arguments):
        brn.use_backend("reference")
        node.forget()
        return prepare(*arguments)

    layer, x, _, _ = made()
    with mock.patch.object(node, "_plans", {}), mock.patch.object(node, "prepare", chosen_meanwhile):
        y = layer(x)
    assert torch.is_tensor(y) and layer.num_batches_tracked == 1


def test_many_threads_and_kinds_and_backends():
    layer, x, _, _ = made()
    results = []

    def work(n):
        own = copy.deepcopy(layer)
        for i in range(200):
            results.append(torch.is_tensor(own(x[:, :, : 1 + i % 5, : 1 + (i + n) % 3])))

    def switch():
        for name in ("native", "reference"):
            brn.use_backend(name)
            node.forget()

    at_once([functools.partial(work, n) for n in range(3)], switch)
    assert len(results) == 600 and all(results)


def test_schedules_that_hold_for_ever():
    """They were taken for negative numbers: open at once."""
    for hold in (2.0**53, 2.0**62, 2.0**63, 1e300):
        layer, x, _, _ = made()
        layer.schedule = brn.ClipSchedule(hold=hold, r_ramp=hold, d_ramp=0)
        other = copy.deepcopy(layer)
        other.schedule = brn.ClipSchedule.batchnorm()
        for _ in range(3):
            assert torch.equal(layer(x), other(x))


def test_automatic_limits():
    layers = [made()[0] for _ in range(2)]
    for layer in layers:
        layer.schedule = brn.ClipSchedule.auto()
    for step in range(30):
        x = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(step)) + step / 10
        y = layers[0](x)
        assert is_in_cpp(y)
        with in_python():
            assert torch.equal(y, layers[1](x))
    assert layers[0].auto_limits()[1].min() > 0.1
    for name, buffer in layers[1].named_buffers():
        assert torch.equal(layers[0].get_buffer(name), buffer)


@pytest.mark.parametrize("fault", ["rows", "dtype", "gaps"])
def test_another_state_of_automatic_limits(fault):
    layer, x, _, _ = made()
    layer.schedule = brn.ClipSchedule.auto()
    layer(x)
    state = layer.auto_state.clone()
    layer._buffers["auto_state"] = {
        "rows": torch.cat([state, state]), "dtype": state.half(), "gaps": torch.stack([state, state], 2)[..., 0]
    }[fault]  # fmt: skip
    other = copy.deepcopy(layer)
    if fault != "gaps":
        with pytest.raises(ValueError, match="auto_state: expected"):
            layer(x)
        return
    y = layer(x)
    with in_python():
        assert torch.equal(y, other(x)) and torch.equal(layer.auto_state, other.auto_state)
    assert layer.auto_state[0, 0] == 2


def test_a_number_beyond_all_bounds_is_pythons():
    layer, x, _, _ = made()
    layer(x)
    layer.momentum = 10**400
    with in_python(), pytest.raises(Exception) as expected:
        layer(x)
    with pytest.raises(expected.type):
        layer(x)


@pytest.mark.parametrize("wants", [True, False])
def test_the_negative_of_what_memory_holds(wants):
    """``z.conj().imag`` is a view whose memory holds other values than it has."""
    z = torch.randn(8, 1, dtype=torch.complex64)
    x = z.conj().imag
    layer = brn.BatchRenorm1d(1)
    for _ in range(2):
        layer.reset_running_stats()
        y = layer(x)
    expected = copy.deepcopy(layer)
    expected.reset_running_stats()
    assert x.is_neg() and torch.equal(y, expected(x.resolve_neg()))
    if wants:
        a, b = (t.detach().requires_grad_() for t in (x.resolve_neg(), x.resolve_neg()))
        layer(a).backward(x.detach())
        expected(b).backward(x.detach().resolve_neg())
        assert torch.equal(a.grad, b.grad)


def test_a_gradient_that_is_zero_and_has_no_memory():
    def gradients(layer, x, extra, dy):
        return torch.autograd.grad(layer(x, extra), [x, layer.weight], torch._efficientzerotensor(dy.shape))

    compared(lambda: made(residual=True, activation="relu"), gradients)


def test_what_may_be_planned_is_asked_more_and_more_rarely():
    layer, x, extra, _ = made(layout="with gaps", residual=True)
    with mock.patch.object(node, "_plans", {}), mock.patch.object(node, "prepare", return_value=False) as asked:
        counts = []
        for _ in range(20):
            layer(x, extra)
            counts.append(asked.call_count)
    assert [counts.index(n) + 1 for n in range(1, 6)] == [1, 2, 4, 8, 16] and counts[-1] == 5


@pytest.mark.parametrize("which", ["eps", "residual's memory", "x's gradient", "residual's gradient", "statistics"])
def test_calls_of_another_kind_beside_one_that_has_a_plan(which):
    """Each in turn, so that one that is taken for another shows."""
    layer, x, extra, dy = made(torch.float64, residual=True, activation="silu")
    layer(x, extra)
    if which == "eps":
        layer.eps = 0.5
    elif which == "residual's memory":
        extra = laid_out(extra.detach(), "with gaps").requires_grad_()
    elif which == "x's gradient":
        x = x.detach()
    elif which == "residual's gradient":
        extra = extra.detach()
    else:
        layer.track_running_stats = False
    other = copy.deepcopy(layer)

    def derivatives(layer):
        wanted = asked(x, extra, *layer.parameters())
        y = layer(x, extra)
        first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        again = torch.autograd.grad(y, wanted, dy, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum((g * g).sum() for g in again), wanted, allow_unused=True)]

    found = derivatives(layer)
    assert is_in_cpp(found[0])
    with in_python():
        expected = derivatives(other)
    for one, another in zip(found, expected, strict=True):
        assert one is another is None or torch.equal(one, another)
