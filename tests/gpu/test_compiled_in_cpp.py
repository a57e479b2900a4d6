"""The operators of compiled graphs on the GPU: in C++, in the compiler's layout, with the results of eager calls."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

import brn_kernels as brn
from brn_kernels import node, ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU; tests/test_compiled.py runs on a CPU"),
    pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`"),
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (brn.BatchRenorm2d(64, activation="relu") for _ in range(2))

    def forward(self, x):
        h = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(h), residual=x)


@pytest.fixture(autouse=True)
def triton():
    torch._dynamo.reset()
    with brn.use_backend("triton"):
        node.forget()
        yield
        node.forget()
    torch._dynamo.reset()


def step(net, run, x, dy):
    y = run(x)
    return [y.detach().clone(), *torch.autograd.grad(y, [x, *net.parameters()], dy)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_of_a_compiled_block(mode, memory_format):
    torch.manual_seed(0)
    net = Block().to("cuda", memory_format=memory_format)
    x = torch.randn(8, 64, 20, 20, device="cuda").contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn_like(x)
    exact = copy.deepcopy(net).double()
    expected = step(exact, exact, x.detach().double().requires_grad_(), dy.double())
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(4):  # Triton has launched all kernels before C++ does
        step(net, compiled, x, dy)
    refuse = mock.Mock(side_effect=AssertionError("in Python"))
    for buffer, initial in zip(net.buffers(), Block().buffers(), strict=True):
        buffer.copy_(initial)
    with mock.patch.multiple(ops, forward_implementation=refuse, backward_implementation=refuse):
        found = step(net, compiled, x, dy)
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another.float(), rtol=2e-2, atol=2e-2)  # TF32 convolutions
    for name, buffer in exact.named_buffers():
        torch.testing.assert_close(net.get_buffer(name).double(), buffer.double(), rtol=1e-3, atol=1e-3)
