"""Calls in C++ on the GPU: what those in Python give, to the bit, and in graphs, on streams, on other devices."""

import contextlib
import subprocess
import sys
from unittest import mock

import pytest
import torch

import brn_kernels as brn
from brn_kernels import node

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU; tests/test_node_triton.py stands in for its driver"
    ),
    pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`"),
]

SMALL, LARGE = (8, 64, 4, 4), (16, 64, 56, 56)  # one launch each way, and two


@pytest.fixture(autouse=True)
def triton():
    with brn.use_backend("triton"), mock.patch.object(node, "_plans", {}):
        yield


def made(shape=SMALL, dtype=torch.float32, channels_last=True, residual=False, activation=None, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def normal():
        return torch.randn(shape, generator=generator).to(device, dtype).to(memory_format=memory_format)

    schedule = brn.ClipSchedule.constant(1.05, 0.05)
    layer = brn.BatchRenorm2d(shape[1], activation=activation, device=device, schedule=schedule)
    x, dy = normal().requires_grad_(), normal()
    return layer, x, normal().requires_grad_() if residual else None, dy


def step(layer, x, extra, dy):
    """Everything it gives, and the statistics afterwards."""
    y = layer(x, extra)
    wanted = [t for t in (x, extra, *layer.parameters()) if t is not None]
    gradients = torch.autograd.grad(y, wanted, dy)
    return is_in_cpp(y), [y.detach(), *gradients, *[buffer.clone() for buffer in layer.buffers()]]


def is_in_cpp(y):
    return type(y.grad_fn).__name__ == "CppFunction"


@contextlib.contextmanager
def in_python():
    with mock.patch.object(node, "module", lambda: None):
        yield


def same(found, expected):
    return all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("residual, activation", [(False, None), (False, "relu"), (True, "relu"), (False, "silu")])
def test_the_same_bits_as_by_python(shape, dtype, channels_last, residual, activation):
    layer, *inputs = made(shape, dtype, channels_last, residual, activation)
    with in_python():
        expected = [step(layer, *inputs)[1] for _ in range(3)]
    layer.reset_running_stats()
    for each in expected:
        was_in_cpp, found = step(layer, *inputs)
        assert was_in_cpp and same(found, each)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_in_a_cuda_graph_that_is_replayed_beside_calls(shape):
    layer, x, _, dy = made(shape, activation="relu")
    other = made(shape, activation="relu")[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x, None, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        was_in_cpp, found = step(layer, x, None, dy)
    assert was_in_cpp
    layer.reset_running_stats()
    expected = step(other, x, None, dy)[1]
    with torch.cuda.stream(stream):
        graph.replay()
    for _ in range(20):
        step(other, x, None, dy)
    torch.cuda.synchronize()
    assert same(found, expected)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_on_several_streams_at_once(shape):
    layers = [made(shape, activation="relu") for _ in range(4)]
    with in_python():
        expected = [step(layer, *inputs)[1] for layer, *inputs in layers]
    for layer, *inputs in layers:
        layer.reset_running_stats()
        step(layer, *inputs)
        layer.reset_running_stats()
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    found = []
    for stream, (layer, *inputs) in zip(streams, layers, strict=True):
        with torch.cuda.stream(stream):
            found.append(step(layer, *inputs))
    torch.cuda.synchronize()
    assert all(was_in_cpp for was_in_cpp, _ in found)
    assert all(same(one, another) for (_, one), another in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_a_device_that_is_not_the_current_one():
    layer, *inputs = made(device="cuda:1")
    with in_python():
        expected = step(layer, *inputs)[1]
    layer.reset_running_stats()
    was_in_cpp, found = step(layer, *inputs)
    assert was_in_cpp and same(found, expected) and torch.cuda.current_device() == 0


FIRST = """
import threading
import torch, brn_kernels as brn
layer = brn.BatchRenorm2d(64, device="cuda")
x, dy = torch.randn(2, 8, 64, 4, 4, device="cuda")
x.requires_grad_()
for _ in range(2):
    y = layer(x)
    gradients = torch.autograd.grad(y, x, dy)
results = []
thread = threading.Thread(target=lambda: results.append(layer(x)))  # CUDA's runtime has done nothing in it
thread.start()
thread.join()
gradients = torch.autograd.grad(results[0], x, dy)
torch.cuda.synchronize()
print(type(results[0].grad_fn).__name__)
"""


@pytest.mark.parametrize("stream", ["", "torch.cuda.set_stream(torch.cuda.Stream())"], ids=["default", "side"])
def test_a_thread_in_which_nothing_else_has_run(stream):
    code = FIRST.replace("layer =", f"{stream}\nlayer =", 1)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == ["CppFunction"], run.stdout + run.stderr


def test_nothing_waits_for_the_gpu():
    layer, *inputs = made(activation="relu")
    for _ in range(3):
        step(layer, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(*inputs[:2])
        y.backward(inputs[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_in_cpp(y)
