"""Triton's kernels launched by autograd's node in C++, on the GPU."""

from unittest import mock

import pytest
import torch

import brn_kernels as brn
from brn_kernels import node

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU; tests/test_node_triton.py stands in for Triton"
    ),
    pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`"),
]

SHAPE = (8, 64, 4, 4)


def made(dtype, memory_format, residual, activation):
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(SHAPE, generator=generator).to("cuda", dtype).to(memory_format=memory_format)

    layer = brn.BatchRenorm2d(SHAPE[1], activation=activation, device="cuda")
    x, dy = normal().requires_grad_(), normal()
    return layer, x, normal().requires_grad_() if residual else None, dy


def step(layer, x, extra, dy):
    y = layer(x, extra)
    wanted = [t for t in (x, extra, *layer.parameters()) if t is not None]
    return y, torch.autograd.grad(y, wanted, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("residual, activation", [(False, None), (False, "relu"), (True, "relu"), (False, "silu")])
def test_the_same_bits_as_by_python(dtype, memory_format, residual, activation):
    with brn.use_backend("triton"), mock.patch.object(node, "_plans", {}):
        layer, *inputs = made(dtype, memory_format, residual, activation)
        with mock.patch.object(node, "module", lambda: None):
            _, expected = step(layer, *inputs)
        layer.reset_running_stats()
        y, found = step(layer, *inputs)
    assert type(y.grad_fn).__name__ == "CppFunction"
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))


def test_in_a_cuda_graph():
    with brn.use_backend("triton"):
        layer, x, _, dy = made(torch.float32, torch.contiguous_format, False, "relu")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(layer, x, None, dy)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y, found = step(layer, x, None, dy)
        assert type(y.grad_fn).__name__ == "CppFunction"
        layer.reset_running_stats()
        graph.replay()
        replayed = [t.clone() for t in found]
        layer.reset_running_stats()
        expected = step(layer, x, None, dy)[1]
    assert all(torch.equal(one, another) for one, another in zip(replayed, expected, strict=True))
