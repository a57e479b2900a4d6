"""What a compiler makes of networks with these layers: no copies into another layout, and the same gradients."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import brn_kernels as brn


class Block(nn.Module):
    """Convolutions, and layers with all that they fuse, in a block with an addition."""

    def __init__(self, activation="relu", after=None):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(c, 8, 3, padding=1, bias=False) for c in (3, 8, 8))
        self.norm1 = brn.BatchRenorm2d(8, activation=activation)
        self.norm2 = brn.BatchRenorm2d(8, activation=activation)
        self.norm3 = brn.BatchRenorm2d(8, activation=activation)
        self.after = after

    def forward(self, x):
        h = self.norm1(self.conv1(x))
        h = self.norm2(self.conv2(h), residual=h)
        if self.after is not None:
            h = self.after(h)
        return self.norm3(self.conv3(h))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Inductor's caches know nothing of an operator's tags."""
    torch._dynamo.reset()
    with inductor_config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def training(net, run, x, dy):
    """Y, all gradients, and what the layers have updated."""
    x = x.detach().requires_grad_()
    y = run(x)
    gradients = torch.autograd.grad(y, [x, *net.parameters()], dy)
    return [y.detach(), *gradients, *[buffer.clone() for buffer in net.buffers()]]


def compared(net, backend, x):
    """Compiled against eager in float64."""
    torch.manual_seed(0)
    dy = torch.randn_like(copy.deepcopy(net)(x).detach())
    exact = copy.deepcopy(net).double()
    expected = training(exact, exact, x.double(), dy.double())
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    found = training(net, compiled, x, dy)
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another.to(one.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
def test_gradients_of_a_compiled_block(backend, activation, memory_format):
    torch.manual_seed(0)
    net = Block(activation).to(memory_format=memory_format)
    compared(net, backend, torch.randn(4, 3, 9, 7).contiguous(memory_format=memory_format))


def in_place(h):
    return h.mul_(2).add_(1)


def written_to(h):
    h[:, ::2] = 0.5
    return h


@pytest.mark.parametrize("after", [in_place, written_to, nn.functional.relu_])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_result_that_is_changed_afterwards(backend, after):
    """The gradient passes where y was positive, not where what has become of it is."""
    torch.manual_seed(0)
    eager = Block(after=lambda h: after(h.clone()))
    x = torch.randn(4, 3, 9, 7)
    dy = torch.randn(4, 8, 9, 7)
    compiled = Block(after=after)
    compiled.load_state_dict(eager.state_dict())
    expected = training(eager, eager, x, dy)
    found = training(compiled, torch.compile(compiled, fullgraph=True, backend=backend), x, dy)
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_result_that_is_changed_outside_the_graph(backend):
    """It was refused with aot_eager, which kept y."""
    torch.manual_seed(0)
    layer = brn.BatchRenorm2d(4, activation="relu")
    compiled = torch.compile(lambda x, extra: layer(x * 1.0, residual=extra * 1.0), fullgraph=True, backend=backend)
    x, extra = (torch.randn(3, 4, 5, 5, requires_grad=True) for _ in range(2))
    dy = torch.randn(3, 4, 5, 5)
    found = torch.autograd.grad(compiled(x, extra).mul_(2).add_(1), [x, extra], dy)
    expected = torch.autograd.grad(layer(x, residual=extra).mul_(2).add_(1), [x, extra], dy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_kernels_pack_no_bits_that_nobody_wants(backend):
    x, extra = torch.randn(2, 3, 4, 5, 3)
    if reason := brn.available_backends()[backend]:
        pytest.skip(reason)
    kernels = brn.backends.resolve(backend, "cpu")
    rest = (x, extra, *[None] * 8, [3.0, 5.0, 0.0, 0.0, 0.0], 0.1, 1e-5, "relu")
    y, saved, bits = kernels.forward(*rest)
    without = kernels.forward(*rest, wants_bits=False)
    assert bits is not None and without[2] is None
    torch.testing.assert_close(without[:2], (y, saved), rtol=1e-5, atol=1e-5)


def test_a_layer_in_a_convolutions_layout_is_not_copied_into_another():
    """The operator asked for the layout of the trace: five copies of a tensor were made for each layer."""
    torch.manual_seed(0)
    net = Block()
    x, dy = torch.randn(4, 3, 9, 7, requires_grad=True), torch.randn(4, 8, 9, 7)
    compiled = torch.compile(net, fullgraph=True)
    _, (forward, backward) = run_and_get_code(lambda: compiled(x).backward(dy))

    def made_by(code):
        """For each first argument of one of our operators, the line that made it."""
        lines = [line.strip() for line in code.splitlines()]
        ours = [re.search(r"ops\.brn_kernels\.\w+\.default\((\w+)", line) for line in lines]
        names = [found[1] for found in ours if found]
        return [next(line for line in lines if line.startswith(f"{name} = ")) for name in names]

    assert [("convolution" in line) for line in made_by(forward)] == [True] * 3, made_by(forward)
    channel_strides = re.findall(
        r"\(4, 8, 9, 7\), \(\d+, (\d+), \d+, \d+\), 'torch\.ops\.brn_kernels", forward + backward
    )  # fmt: skip
    assert channel_strides == ["1"] * 6, channel_strides


def test_no_bits_are_packed_in_a_trace():
    """Their order would follow from memory that the compiler lays out as it likes."""
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    noting = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(note(graph, inputs)))
    net = Block()
    torch.compile(net, fullgraph=True, backend=noting)(torch.randn(4, 3, 9, 7)).sum().backward()
    forward, backward = graphs
    kinds = [node.meta["val"].dtype for node in forward.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert torch.uint8 not in kinds
    gates = [node for node in backward.graph.nodes if str(node.target).startswith(("aten.where", "aten.masked_fill"))]
    assert len(gates) == 1, backward.graph
