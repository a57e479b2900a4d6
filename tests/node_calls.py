"""Layers and inputs whose calls are in C++ or in Python, for the tests of both."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

import brn_kernels as brn
from brn_kernels import node

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "with gaps")
ACTIVATIONS = (None, "relu", "silu")


@contextlib.contextmanager
def in_python():
    """Calls by ``BatchRenormFunction``."""
    with mock.patch.object(node, "module", lambda: None):
        yield


def laid_out(tensor, layout):
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "with gaps":
        return torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]]
    return tensor


def made(
    dtype=torch.float32,
    layout="contiguous",
    residual=False,
    activation=None,
    wants=(True,) * 4,
    affine=True,
    like_x=False,
):
    """A layer and its inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    layer = brn.BatchRenorm2d(6, activation=activation, affine=affine)
    if affine:
        layer.weight.data.normal_(1, 0.2, generator=generator)
        layer.bias.data.normal_(generator=generator)
        layer.weight.requires_grad_(wants[2])
        layer.bias.requires_grad_(wants[3])
    if like_x or dtype == torch.float64:
        layer.to(dtype)
    x = laid_out(normal(4, 6, 5, 3), layout).requires_grad_(wants[0])
    extra = laid_out(normal(4, 6, 5, 3), layout).requires_grad_(wants[1]) if residual else None
    return layer, x, extra, normal(4, 6, 5, 3)


def asked(*tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def is_in_cpp(y):
    return type(y.grad_fn).__name__ == "CppFunction"


def compared(make, gradients):
    """``gradients(layer, x, residual, dy)`` by C++ and by Python: the same bits, and the same statistics."""
    layer, *inputs = make()
    ours = gradients(layer, *inputs)
    with in_python():
        other, *inputs = make()
        theirs = gradients(other, *inputs)
    assert len(ours) == len(theirs) > 0
    for one, another in zip(ours, theirs, strict=True):
        assert one.dtype == another.dtype and one.stride() == another.stride()
        assert torch.equal(one, another)
    for name, buffer in other.named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer)
    assert layer.num_batches_tracked == 1


def at_once(works, meanwhile):
    """Each of ``works`` in a thread of its own, and ``meanwhile`` again and again until they end; the first error."""
    ended = threading.Event()

    def go_on():
        while not ended.is_set():
            meanwhile()

    with ThreadPoolExecutor(len(works) + 1) as pool:
        beside = pool.submit(go_on)
        try:
            for each in [pool.submit(work) for work in works]:
                each.result()
        finally:
            ended.set()
    beside.result()
