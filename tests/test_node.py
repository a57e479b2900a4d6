"""Calls in C++: what those in Python give, to the bit; and whatever is not ordinary goes there."""

import contextlib
import copy
import threading
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from node_calls import ACTIVATIONS, DTYPES, LAYOUTS, asked, compared, in_python, is_in_cpp, laid_out, made
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import brn_kernels as brn
from brn_kernels import node, observe

pytestmark = pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`")


@pytest.fixture(autouse=True)
def native():
    with brn.use_backend("native"):
        yield


@contextlib.contextmanager
def no_way_back():
    """Fails where a backward in C++ goes to Python: plans made within have nothing to go to."""

    def refuse(*_, **__):
        raise AssertionError("the backward was not in C++")

    with mock.patch.object(node, "_plans", {}), mock.patch.object(node, "gradients", refuse):
        yield


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), like=st.sampled_from((*LAYOUTS, "expanded")),
    residual=st.booleans(), activation=st.sampled_from(ACTIVATIONS), affine=st.booleans(),
    like_x=st.booleans(),
    wants=st.tuples(*[st.booleans()] * 4).filter(any),
)  # fmt: skip
def test_gradients_are_those_in_python(dtype, layout, like, residual, activation, affine, like_x, wants):
    def gradients(layer, x, extra, dy):
        y = layer(x, extra)
        wanted = asked(x, extra, *layer.parameters())
        if not wanted:
            return [y]
        dy = dy[:1, :, :1].expand(4, 6, 5, 3) if like == "expanded" else laid_out(dy, like)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    with brn.use_backend("native"):
        compared(lambda: made(dtype, layout, residual, activation, wants, affine, like_x), gradients)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_ordinary_backward_is_in_cpp(layout, activation, residual):
    with no_way_back():
        layer, x, extra, dy = made(torch.float32, layout, residual, activation)
        y = layer(x, extra)
        assert is_in_cpp(y)
        torch.autograd.grad(y, asked(x, extra, *layer.parameters()), torch.empty_like(y).copy_(dy))


def test_what_stands_in_for_python_would_be_noticed():
    with no_way_back():
        layer, x, _, dy = made()
        with pytest.raises(AssertionError, match="was not in C"):
            layer(x).backward(dy[:1].expand_as(x))


@pytest.mark.parametrize("chosen", [[0], [1], [2, 3]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_some_of_the_gradients(chosen, activation):
    def gradients(layer, x, extra, dy):
        inputs = [x, extra, layer.weight, layer.bias]
        return torch.autograd.grad(layer(x, extra), [inputs[i] for i in chosen], dy)

    compared(lambda: made(residual=True, activation=activation), gradients)


def test_gradients_accumulate_where_backward_puts_them():
    def gradients(layer, x, extra, dy):
        y = layer(x, extra)
        y.backward(dy, retain_graph=True)
        y.backward(dy)
        return [t.grad for t in asked(x, extra, *layer.parameters())]

    compared(lambda: made(residual=True, activation="relu"), gradients)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation, residual):
    def gradients(layer, x, extra, dy):
        wanted = asked(x, extra, *layer.parameters())
        first = torch.autograd.grad(layer(x, extra), wanted, dy.requires_grad_(), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), [*wanted, dy], allow_unused=True)
        return [g for g in (*first, *second) if g is not None]

    compared(lambda: made(torch.float64, residual=residual, activation=activation), gradients)


def test_many_gradients_at_once():
    def gradients(layer, x, extra, dy):
        y = layer(x)
        return torch.autograd.grad(y, [x, layer.weight], torch.stack([dy, 2 * dy]), is_grads_batched=True)

    compared(made, gradients)


def test_a_dispatch_mode_around_the_backward_sees_the_operator():
    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (str(func),)
            return func(*args, **(kwargs or {}))

    layer, x, _, dy = made()
    y = layer(x)
    with Seen() as seen:
        y.backward(dy)
    assert "brn_kernels.backward.default" in seen.names


def test_compiled_autograd():
    layer, x, _, dy = made()
    expected = torch.autograd.grad(copy.deepcopy(layer)(x), x, dy)[0]
    y = layer(x)
    assert is_in_cpp(y)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.backward(dy)
    torch.testing.assert_close(x.grad, expected)


def test_detect_anomaly_and_hooks():
    layer, x, _, dy = made()
    seen = []
    with torch.autograd.detect_anomaly(check_nan=True):
        y = layer(x)
        y.register_hook(lambda gradient: seen.append("y"))
        x.register_hook(lambda gradient: 2 * gradient)
        y.backward(dy)
    with in_python():
        other, x2, _, dy = made()
        other(x2).backward(dy)
    assert seen == ["y"] and torch.equal(x.grad, 2 * x2.grad)


def test_an_unused_output_has_no_gradient():
    """Of two layers' outputs one is not used: its node is run with nothing."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a.clone(), b.clone()

        @staticmethod
        def backward(ctx, da, db):
            return da, None

    layer, x, _, dy = made()
    other, z, _, _ = made()
    a, _ = Both.apply(layer(x), other(z))
    a.backward(dy)
    assert x.grad is not None and z.grad is None and other.weight.grad is None


def test_a_second_backward_through_a_freed_graph_is_refused():
    layer, x, _, dy = made()
    y = layer(x)
    y.backward(dy)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_what_was_changed_in_place_is_refused(which):
    layer, x, _, dy = made()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    with torch.no_grad():
        (x if which == "x" else layer.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_an_error_in_python_comes_out_of_backward():
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise KeyError("as it was raised")

    layer, x, _, dy = made()
    y = layer(x)
    with pytest.raises(KeyError, match="as it was raised"), Refusing():
        torch.autograd.grad(y, x, dy)


def test_many_threads():
    layer, x, _, dy = made()
    with in_python():
        expected = torch.autograd.grad(copy.deepcopy(layer)(x), x, dy)[0]
    results = {}

    def work(i):
        own = copy.deepcopy(layer)
        for _ in range(50):
            own.reset_running_stats()
            results[i] = torch.autograd.grad(own(x), x, dy)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results.values())


def test_graphs_are_freed():
    import weakref

    layer, x, _, dy = made()
    y = layer(x)
    gone = weakref.ref(y)
    y.backward(dy)
    del y
    assert gone() is None


def test_kinds_of_calls_beyond_the_limit_have_their_backward_in_python():
    with mock.patch.object(node, "_plans", {}), mock.patch.object(node, "MOST_PLANS", 1):
        layer, x, _, _ = made()
        assert is_in_cpp(layer(x)) and is_in_cpp(layer(x))
        other = layer(x[:2])
        assert not is_in_cpp(other)
        other.sum().backward()


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("dense_first", [True, False])
def test_a_parameter_with_gaps_beside_a_dense_one_of_the_same_kind(which, dense_first):
    """The plan of the dense one was taken, and the memory read as if it had no gaps."""

    def gradients(layer, x, _, dy):
        if dense_first:
            layer(x)
        wide = torch.arange(1.0, 13).view(6, 2).requires_grad_()
        parameters = {"weight": layer.weight, "bias": layer.bias, which: wide[:, 0]}
        mean, var = torch.zeros(6), torch.ones(6)
        y = brn.batch_renorm(x, mean, var, **parameters, training=True)
        layer.num_batches_tracked.fill_(1)
        return torch.autograd.grad(y, [x, wide], dy)

    with mock.patch.object(node, "_plans", {}):
        compared(made, gradients)


def swapped(which, layout):
    def gradients(layer, x, extra, dy):
        y = layer(x, extra)
        changed = {"x": x, "residual": extra, "weight": layer.weight, "bias": layer.bias}[which]
        if which in ("x", "residual"):
            changed.data = laid_out(changed.detach().clone(), layout)
        else:
            changed.data = torch.stack([changed.detach(), torch.zeros(6)], dim=1)[:, 0]
        return torch.autograd.grad(y, asked(x, extra), laid_out(dy, layout) if which == "x" else dy)

    return gradients


@pytest.mark.parametrize("which", ["x", "residual", "weight", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_memory_that_was_swapped_after_the_forward(which, layout, activation):
    """``tensor.data = ...`` leaves no trace that autograd could find; it was read as what it had been."""
    compared(lambda: made(residual=True, activation=activation), swapped(which, layout))


def test_memory_that_became_smaller_after_the_forward_is_not_read_beyond():
    def gradients(layer, x, extra, dy):
        y = layer(x)
        x.data = torch.zeros(()).expand(x.shape)
        return torch.autograd.grad(y, x, dy)

    compared(made, gradients)


def test_the_node_has_a_name():
    layer, x, _, _ = made()
    assert layer(x).grad_fn.name() == "torch::autograd::CppNode<brn::BatchRenormBackward>"
    assert "BatchRenormBackward" in repr(layer(x))


@pytest.mark.parametrize("mask", [False, True])
def test_a_mask_stays_in_python(mask):
    layer, x, _, _ = made()
    y = layer(x, mask=torch.ones(4, 5, 3, dtype=torch.bool) if mask else None)
    assert is_in_cpp(y) != mask


def test_networks_train_alike():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), brn.BatchRenorm2d(8, activation="relu"), nn.Conv2d(8, 8, 3), brn.BatchRenorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip
    batches = [torch.randn(4, 3, 8, 8) for _ in range(5)]
    network(batches[0])

    def trained(network):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for x in batches:
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        return network.state_dict()

    with in_python():
        expected = trained(copy.deepcopy(network))
    found = trained(network)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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
    results, stop = [], threading.Event()

    def work(n):
        own = copy.deepcopy(layer)
        for i in range(200):
            results.append(torch.is_tensor(own(x[:, :, : 1 + i % 5, : 1 + (i + n) % 3])))

    def switch():
        while not stop.is_set():
            for name in ("native", "reference"):
                brn.use_backend(name)
                node.forget()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    switching = threading.Thread(target=switch)
    for thread in (switching, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    switching.join()
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
