"""Memory that does not begin at a multiple of 16 bytes: views of others' memory, slices of flat parameters."""

from types import SimpleNamespace

import pytest
import torch
from triton_calls import LAYOUTS, assert_same, call, moved, run

import brn_kernels as brn
from brn_kernels.backends import reference

PER_CHANNEL = ("weight", "bias", "running_mean", "running_var", "clipped", "num_batches_tracked")
CALLS = [(None, False), ("relu", False), ("relu", True)]
# planes of 8 x 8 in accesses of 16 bytes, of 7 x 7 side by side, and of 3 x 3 in narrow ones
SHAPES = [(2, 4, 8, 8), (2, 8, 7, 7), (3, 5, 3, 3)]


@pytest.fixture
def kernels(backend, device):
    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    if backend == "triton" and device.type == "cpu":
        pytest.skip("to the interpreter all memory is alike")
    return brn.backends.resolve(backend, device.type)


def watched(backend, addresses):
    """The backend, and where the tensors lie that it is given: they may have been copied on the way."""

    def forward(**arguments):
        addresses.update({name: t.data_ptr() for name, t in arguments.items() if isinstance(t, torch.Tensor)})
        return backend.forward(**arguments)

    def backward(dy, x, residual, mask, weight, bias, saved, bits, *others):
        addresses.update(dy=dy.data_ptr(), saved=saved.data_ptr(), bits=None if bits is None else bits.data_ptr())
        return backend.backward(dy, x, residual, mask, weight, bias, saved, bits, *others)

    return SimpleNamespace(forward=forward, backward=backward)


@LAYOUTS
@pytest.mark.parametrize("by", [1, 3])
@pytest.mark.parametrize("name", ["x", "residual", "dy", "saved", "bits", *PER_CHANNEL])
def test_after_aligned_memory_unaligned(kernels, device, channels_last, name, by):
    """What was compiled for aligned memory must not be launched on it, nor the other way round."""
    arguments = call(device, SHAPES[0], torch.float32, channels_last, residual=True, activation="relu")
    dy = torch.randn(SHAPES[0], generator=torch.Generator().manual_seed(2)).to(device)
    dy = dy.to(memory_format=torch.channels_last) if channels_last else dy
    given = {}
    aligned = run(watched(kernels, given), arguments, dy)
    assert given[name] % 16 == 0
    assert_same(aligned, run(reference, arguments, dy))
    if name == "dy":
        dy = moved(dy, by)
    elif name not in ("saved", "bits"):
        arguments = arguments | {name: moved(arguments[name], by)}
    moving = {"bits_moved": by * (name == "bits"), "saved_moved": by * (name == "saved")}
    unaligned = run(watched(kernels, given), arguments, dy, **moving)
    assert given[name] % 16
    assert_same(unaligned, run(reference, arguments, dy))
    again = run(kernels, arguments, dy)
    assert all(torch.equal(again[key], aligned[key]) for key in ("y", "dx", "dweight", "dresidual"))


@LAYOUTS
@pytest.mark.parametrize("dtype, by", [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 4)], ids=str)
@pytest.mark.parametrize("activation, residual", CALLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_all_of_it_unaligned(kernels, device, channels_last, dtype, by, activation, residual, shape):
    arguments = call(device, shape, dtype, channels_last, residual, activation)
    arguments |= {
        name: moved(value, by) for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.numel()
    }
    assert arguments["x"].data_ptr() % 16
    dy = moved(torch.randn_like(arguments["x"], dtype=torch.float32).to(dtype), by)
    given = {}
    ours = run(watched(kernels, given), arguments, dy, bits_moved=by, saved_moved=by)
    assert given["x"] % 16 and given["dy"] % 16
    assert_same(ours, run(reference, arguments, dy))
