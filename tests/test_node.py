"""Backwards in C++: what those in Python give, to the bit; and whatever is not ordinary goes there."""

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
from brn_kernels import node

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
    with mock.patch.object(node, "_plans", {}), mock.patch.object(node, "MOST_KINDS", 1):
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
