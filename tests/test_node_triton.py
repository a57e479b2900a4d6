"""Triton's kernels launched by the backward in C++: the launches that Python makes, and the gradients."""

import ctypes
from unittest import mock

import pytest
import torch
from node_calls import asked, in_python, is_in_cpp, made

import brn_kernels as brn
from brn_kernels import node
from brn_kernels.backends import reference

pytestmark = pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`")


class Launches:
    """Stands in for Triton's launcher: computes the gradients by the reference, in the memory at the addresses."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.made = []

    def run(self, *arguments):
        self.made.append(arguments)
        addresses = arguments[9:19]
        dy, x, bits, weight, bias, saved, dweight, dbias, dx, dresidual = addresses
        inputs = [self._read(a, s, t) for a, s, t in ((dy, X, D), (x, X, D), (weight, C, D), (bias, C, D))]
        kept = self._read(saved, (4, C[0]), D), self._read(bits, (X[0] * X[1], 2), torch.uint8)
        dy, x, weight, bias = inputs
        results = reference.backward(
            dy, x, None, None, weight, bias, *kept, self.activation, dx is not None, dresidual is not None
        )
        for address, result in zip((dx, dweight, dbias, dresidual), results, strict=True):
            if address is not None:
                ctypes.memmove(address, result.contiguous().data_ptr(), result.nbytes)

    @staticmethod
    def _read(address, shape, dtype):
        if address is None:
            return None
        found = torch.empty(shape, dtype=dtype)
        ctypes.memmove(found.data_ptr(), address, found.nbytes)
        return found


X, C, D = (4, 6, 5, 3), (6,), torch.float32


@pytest.fixture
def launches():
    """Triton's kernels as if they had been compiled, for backwards by C++."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu launches them there")
    from brn_kernels.backends.triton import launcher

    stand_in = Launches()

    class Compiled(dict):
        def get(self, key, default=None):
            return stand_in, ("constants",)

    known = launcher.prepared

    def prepared(kernel, grid, dtypes, integers, floats, constants, device):
        with mock.patch.object(constants, "compiled", Compiled()):
            return known(kernel, grid, dtypes, integers, floats, constants, device)

    with (
        brn.use_backend("triton"),
        mock.patch.object(node, "_plans", {}),
        mock.patch.object(launcher, "prepared", prepared),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: ("stream", index), create=True),
    ):
        yield stand_in


@pytest.mark.parametrize("wants", [(True, True, True, True), (True, False, True, False), (False, True, True, True)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_triton_is_launched_as_by_python(launches, activation, residual, affine, wants):
    if not any((wants[0], wants[1] and residual and activation is not None)):
        pytest.skip("then Python adds up weight's and bias's gradients in two launches, of which C++ knows nothing")
    launches.activation = activation
    layer, x, extra, dy = made(residual=residual, activation=activation, wants=wants, affine=affine)
    with mock.patch.object(node, "gradients", mock.Mock(side_effect=AssertionError)):
        y = layer(x, extra)
        found = torch.autograd.grad(y, asked(x, extra, *layer.parameters()), dy)
    ((*head, stream, function, metadata, a, b, c), (*tail, constants)) = (
        launches.made[0][:9], launches.made[0][19:],
    )  # fmt: skip
    assert (stream, function, metadata, a, b, c) == (("stream", None), "function", "metadata", None, None, None)
    assert constants == "constants" and len(head) == 3 and head[2] == 1 and len(launches.made) == 1

    with in_python(), mock.patch("brn_kernels.backends.triton.launcher.launch") as spied:
        from brn_kernels.backends.triton import launch

        spied.side_effect = lambda *_: None
        launch.backward(
            dy, x.detach(), None, None, layer.weight, layer.bias, torch.ones(4, 6),
            torch.zeros(24, 2, dtype=torch.uint8) if residual and activation else None, activation, wants[0],
            wants[1] and residual and activation is not None,
        )  # fmt: skip
    (_, grid, pointers, integers, floats, *_), _ = spied.call_args
    assert tuple(head[:2]) == tuple(grid) and tuple(tail) == (*integers, *floats)
    assert [p is None for p in pointers] == [p is None for p in launches.made[0][9:19]]

    with in_python(), brn.use_backend("reference"):
        other, x, extra, dy = made(residual=residual, activation=activation, wants=wants, affine=affine)
        expected = torch.autograd.grad(other(x, extra), asked(x, extra, *other.parameters()), dy)
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another)


def test_triton_is_not_launched_on_unaligned_memory(launches):
    launches.activation = None
    layer, x, _, dy = made()
    y = layer(x)
    room = torch.empty(dy.numel() + 1)
    dx = torch.autograd.grad(y, x, room[1:].view(dy.shape).copy_(dy))[0]
    assert not launches.made
    with in_python(), brn.use_backend("reference"):
        other, x, _, dy = made()
        torch.testing.assert_close(dx, torch.autograd.grad(other(x), x, dy)[0])


def test_a_profiler_hears_of_tritons_launches(launches):
    import triton

    layer, x, _, dy = made()
    assert is_in_cpp(layer(x))
    with mock.patch.object(triton.knobs.runtime, "launch_enter_hook", lambda _: None):
        layer(x).backward(dy)
    assert not launches.made and x.grad is not None
    x.grad = None
    y = layer(x)
    with mock.patch.object(triton.knobs.runtime, "launch_enter_hook", lambda _: None):
        y.backward(dy)
    assert not launches.made and x.grad is not None


def test_an_error_of_tritons_launcher_comes_out_of_backward(launches):
    launches.run = mock.Mock(side_effect=ValueError("of the launcher"))
    layer, x, _, dy = made()
    with pytest.raises(ValueError, match="of the launcher"):
        layer(x).backward(dy)
