"""The operators as PyTorch's compiler sees them."""

import copy

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import brn_kernels as brn
from brn_kernels import ops

SCHEDULE = [1.2, 0.3, 0.0, 0.0, 0.0]
RAMP = brn.ClipSchedule(r_max=1.5, d_max=0.5, hold=3, r_ramp=9, d_ramp=6)


def forward_arguments(shape, device, dtype=torch.float32, *, full=False, activation=None, seed=0):
    """Positional arguments of ``ops.forward``; ``full``: every optional tensor is given."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    residual = torch.randn(shape, generator=generator).to(device, dtype) if full else None
    channels = shape[1]
    vectors = [torch.rand(channels, generator=generator).to(device) + 0.5 for _ in range(4)] if full else [None] * 4
    weight, bias, mean, var = vectors
    counter = torch.tensor(7, device=device) if full else None
    clipped = torch.zeros(channels, dtype=torch.bool, device=device) if full else None
    return [
        x, residual, None, weight, bias, mean, var, counter, clipped, None, SCHEDULE, 0.1, 1e-5, activation,
        brn.backends.selected(), False,
    ]  # fmt: skip


CASES = [
    {"shape": (4, 3)},
    {"shape": (4, 3, 5), "full": True},
    {"shape": (2, 9, 3, 4), "full": True, "activation": "relu"},
    {"shape": (2, 3, 2, 3, 2), "full": True, "activation": "silu", "dtype": torch.bfloat16},
    {"shape": (0, 3, 4), "full": True, "activation": "relu"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck(backend, device, case, channels_last):
    arguments = forward_arguments(device=device, **case)
    if channels_last and len(case["shape"]) == 4:
        arguments[0] = arguments[0].to(memory_format=torch.channels_last)
    library.opcheck(ops.forward, arguments)
    y, saved, bits = ops.forward(*arguments)
    x, residual, mask, weight, bias = arguments[:5]
    activation = arguments[13]
    for needs_dx in (True, False):
        library.opcheck(
            ops.backward,
            [
                torch.randn_like(y),
                x,
                residual,
                mask,
                weight,
                bias,
                saved,
                bits,
                activation,
                needs_dx,
                needs_dx,
                brn.backends.selected(),
            ],
        )


@pytest.mark.parametrize("activation", [None, "silu"])
def test_coefficients_are_filled_and_give_the_same_output(backend, device, activation):
    if backend == "reference":
        pytest.skip("has none: it writes y of what is saved for the backward")
    arguments = forward_arguments((2, 9, 3, 4), device, full=True, activation=activation)
    arguments[1] = None  # the residual
    coefficients = torch.empty(3, 9, device=device)
    library.opcheck(ops.forward, [*arguments, None, coefficients])
    y, _, _ = ops.forward(*arguments, None, coefficients)
    kernels = brn.backends.resolve(backend, device.type)
    assert torch.equal(kernels.apply(arguments[0], coefficients, activation), y)


def test_the_schema_declares_what_is_updated():
    schema = str(ops.forward._schema)
    for name in ("running_mean", "running_var", "num_batches_tracked", "clipped", "coefficients"):
        argument = next(a for a in ops.forward._schema.arguments if a.name == name)
        assert argument.alias_info is not None and argument.alias_info.is_write, schema


class Operators(TorchDispatchMode):
    """Notes the names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **keywords or {})


def test_a_dispatch_mode_sees_the_operators(backend, device):
    """Unobserved calls go past the dispatcher; whoever looks must find the operators all the same."""
    layer = brn.BatchRenorm2d(4, device=device)
    x = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
    with Operators() as seen:
        layer(x).backward(torch.randn_like(x))
    assert {"brn_kernels.forward.default", "brn_kernels.backward.default"} <= set(seen.names)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm1 = brn.BatchRenorm2d(4, momentum=0.2, schedule=RAMP, activation="relu")
        self.norm2 = brn.BatchRenorm2d(4, momentum=None, schedule=RAMP, activation="relu")

    def forward(self, x, mask=None):
        h = self.norm1(self.conv(x))
        return self.norm2(h * 1.5, residual=h, mask=mask)


@pytest.fixture
def compiler():
    """Fresh caches; Dynamo's count of graphs compiled in the test."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield counter
    torch._dynamo.reset()


@pytest.mark.many_steps
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_compiled_training_equals_eager_over_a_moving_ramp_without_recompiling(backend, device, compiler, masked):
    torch.manual_seed(0)
    eager = Net().to(device)
    compiled_net = copy.deepcopy(eager)
    compiled = torch.compile(compiled_net, fullgraph=True, backend=compiler)
    for step in range(20):
        torch.manual_seed(step)
        x = torch.randn(4, 3, 6, 6).to(device) * (1 + step % 3)
        mask = (torch.rand(4, 6, 6) < 0.8).to(device) if masked else None
        dy = torch.randn(4, 4, 6, 6).to(device)
        outputs = []
        for net, run in ((eager, eager), (compiled_net, compiled)):
            net.zero_grad()
            y = run(x, mask)
            y.backward(dy)
            outputs.append(y)
        gradients = [[p.grad for p in net.parameters()] for net in (eager, compiled_net)]
        buffers = [list(net.buffers()) for net in (eager, compiled_net)]
        # kernels that pack bits, which only eager ones do, may add up in another order
        tolerance = 0 if masked or backend == "reference" else 1e-5
        for found, expected in ((outputs[1:], outputs[:1]), gradients[::-1], buffers[::-1]):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert compiler.frame_count == 1
    assert eager.norm1.num_batches_tracked.item() == 20


def test_compiled_evaluation_equals_eager(backend, device, compiler):
    net = Net().to(device)
    net(torch.randn(4, 3, 6, 6, device=device))
    net.eval()
    x = torch.randn(2, 3, 6, 6, device=device)
    assert torch.equal(torch.compile(net, fullgraph=True, backend=compiler)(x), net(x))
    assert compiler.frame_count == 1


def test_compiled_function_takes_limits_that_move_as_tensors(backend, device, compiler):
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)

    def step(x, r_max):
        return brn.batch_renorm(x, mean, var, training=True, r_max=r_max, d_max=1.0)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for limit in (1.0, 1.5, 2.0):
        compiled(torch.randn(4, 3, device=device), torch.tensor(limit, device=device))
    assert compiler.frame_count == 1


def test_compiled_without_a_gradient_wanted(backend, device, compiler):
    """Dynamo's internal error for an autograd Function none of whose inputs requires a gradient."""
    net = Net().to(device)
    compiled = torch.compile(net, fullgraph=True, backend=compiler)
    with torch.no_grad():
        compiled(torch.randn(4, 3, 6, 6, device=device))
    net.requires_grad_(False)
    compiled(torch.randn(4, 3, 6, 6, device=device))
    assert net.norm2.num_batches_tracked.item() == 2


@pytest.mark.parametrize("compiled_inside", [True, False])
def test_checkpointing_with_compile_is_right_or_refused(backend, device, compiler, compiled_inside):
    """A second run would see statistics from after the update: gradients were wrong without a word."""
    net, plain = Net().to(device), Net().to(device)
    plain.load_state_dict(net.state_dict())
    for module in (net, plain):
        for layer in (module.norm1, module.norm2):
            layer.schedule = brn.ClipSchedule.unclipped()
    if compiled_inside:
        block = torch.compile(net, fullgraph=True, backend=compiler)
        run = lambda x: checkpoint(block, x, use_reentrant=False)  # noqa: E731
    else:
        run = torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), backend=compiler)
    x = torch.randn(4, 3, 6, 6, device=device)
    y, expected = run(x), plain(x)
    dy = torch.randn_like(y)
    try:
        y.backward(dy)
    except RuntimeError as error:
        assert "checkpointing together with torch.compile" in str(error)
        return
    assert not compiled_inside
    expected.backward(dy)
    for (name, p), q in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name
