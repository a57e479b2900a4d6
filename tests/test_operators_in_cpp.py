"""The operators in C++: the same bits as in Python, and what is left to Python."""

import copy
import functools
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from node_calls import ACTIVATIONS, DTYPES, LAYOUTS, at_once, laid_out
from operator_calls import (
    IN_PYTHON,
    SCHEDULES,
    alike,
    backward_arguments,
    copied,
    forward_arguments,
    result,
    without_python,
)
from torch import library
from torch._inductor import config as inductor_config

import brn_kernels as brn
from brn_kernels import cpp, distributed, ops

pytestmark = pytest.mark.skipif(cpp.module() is None, reason="not built: run `brn build`")


@pytest.fixture(autouse=True)
def fresh():
    cpp.module().forget_operators()
    yield
    cpp.module().on_new_kinds(cpp.prepare_forward_operator, cpp.prepare_backward_operator, cpp.MOST_KINDS)
    cpp.module().forget_operators()


MEMORY = [
    ((4, 6, 5, 3), "contiguous"), ((4, 6, 5, 3), "channels_last"), ((5, 6), "contiguous"),
    ((2, 6, 2, 1, 3), "contiguous"),
]  # fmt: skip
FUSED = st.tuples(st.booleans(), st.sampled_from(ACTIVATIONS))


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES), memory=st.sampled_from(MEMORY), fused=FUSED, affine=st.booleans(),
    tracked=st.booleans(), schedule=st.sampled_from([*SCHEDULES, "tensor", "auto"]),
    momentum=st.sampled_from([0.1, 1, None]), needs=st.tuples(st.booleans(), st.booleans()),
    traced=st.booleans(),
)  # fmt: skip
def test_the_same_bits_as_in_python(dtype, memory, fused, affine, tracked, schedule, momentum, needs, traced):
    momentum = 0.1 if momentum is None and not tracked else momentum
    shape, layout = memory
    forward = forward_arguments(
        dtype, (layout, layout), *fused, affine, tracked, schedule, momentum, shape=shape, traced=traced
    )
    backward = backward_arguments(forward, "as y", needs[0], needs[1] and fused[0])
    for operator, arguments in ((ops.forward, forward), (ops.backward, backward)):
        expected = result(IN_PYTHON[operator], arguments)
        assert all(map(torch.is_tensor, expected))
        with without_python():
            alike(result(operator, arguments), expected)
            alike(result(operator, arguments), expected)


OTHER_FORWARDS = {
    "mask": {2: torch.rand(4, 1, 5, 3) < 0.7},
    "coefficients": {17: torch.empty(3, 6)},
    "x with gaps": {0: laid_out(torch.randn(4, 6, 5, 3), "with gaps")},
    "x in no layout": {0: torch.randn(5, 6, 4, 3).transpose(0, 2)},
    "the negative of x": {0: torch.randn(4, 6, 5, 3, dtype=torch.complex64).conj().imag},
    "weight with gaps": {3: torch.rand(6, 2)[:, 0]},
    "statistics with gaps": {5: torch.rand(6, 2)[:, 0]},
    "clipped with gaps": {8: torch.zeros(6, 2, dtype=torch.bool)[:, 0]},
    "residual in another layout": {1: laid_out(torch.randn(4, 6, 5, 3), "channels_last")},
    "residual with gaps": {1: laid_out(torch.randn(4, 6, 5, 3), "with gaps")},
    "weight in half precision": {3: torch.rand(6).half()},
    "hold for ever": {10: [3.0, 5.0, 1e300, 1e300, 0.0]},
    "no activation of that name": {13: "gelu"},
    "no backend of that name": {14: "fastest"},
    "reference": {14: "reference"},
    "group": {16: "no such group"},
    "four numbers in the schedule": {10: [3.0, 5.0, 0.0, 0.0]},
    "no values": {0: torch.empty(0, 6, 5, 3)},
    "one dimension": {0: torch.randn(6)},
    "mean alone": {6: None},
    "integers": {0: torch.ones(4, 6, 5, 3, dtype=torch.int64)},
    "weight too short": {3: torch.rand(5)},
    "residual of another shape": {1: torch.randn(4, 6, 5, 2)},
    "clipped too long": {8: torch.zeros(7, dtype=torch.bool)},
    "counter of 32 bits": {7: torch.tensor(20, dtype=torch.int32)},
    "cumulative without a counter": {11: None, 7: None},
    "limits of one number": {9: torch.tensor([1.3])},
    "state of four rows": {18: torch.zeros(4, 6)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", OTHER_FORWARDS)
def test_forwards_that_are_not_plain_are_as_in_python(what):
    arguments = forward_arguments()
    ops.forward(*copied(arguments))
    for place, value in OTHER_FORWARDS[what].items():
        arguments[place] = value
    expected = result(IN_PYTHON[ops.forward], arguments)
    for _ in range(2):
        alike(result(ops.forward, arguments), expected)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layouts", [LAYOUTS[:2], LAYOUTS[1::-1]], ids=str)
def test_a_gradient_in_another_format_than_x_is_copied(layouts, activation):
    """As the gradients that a compiled graph is given are."""
    forward = forward_arguments(layouts=(layouts[0],) * 2, activation=activation)
    arguments = backward_arguments(forward, layouts[1])
    expected = result(IN_PYTHON[ops.backward], arguments)
    with without_python():
        alike(result(ops.backward, arguments), expected)


OTHER_BACKWARDS = {
    "mask": {3: torch.rand(4, 1, 5, 3) < 0.7},
    "dy with gaps": {0: laid_out(torch.randn(4, 6, 5, 3), "with gaps")},
    "dy with channels first": {0: torch.randn(6, 4, 5, 3).transpose(0, 1)},
    "dy in no layout": {0: torch.randn(5, 6, 4, 3).transpose(0, 2)},
    "expanded dy": {0: torch.ones(()).expand(4, 6, 5, 3)},
    "zero dy": {0: torch._efficientzerotensor((4, 6, 5, 3))},
    "weight with gaps": {4: torch.rand(6, 2)[:, 0]},
    "saved with gaps": {6: (torch.rand(4, 6, 2) + 0.5)[..., 0]},
    "no residual, no activation": {2: None, 8: None, 7: None},
    "bits with gaps": {7: torch.randint(0, 255, (24, 2, 2), dtype=torch.uint8)[..., 0]},
    "dy of another shape": {0: torch.randn(4, 6, 5, 2)},
    "dy of another dtype": {0: torch.randn(4, 6, 5, 3).double()},
    "saved of another dtype": {6: torch.rand(4, 6).double()},
    "bits of another shape": {7: torch.zeros(23, 2, dtype=torch.uint8)},
    "no activation of that name": {8: "gelu"},
}


@pytest.mark.parametrize("what", OTHER_BACKWARDS)
def test_backwards_that_are_not_plain_are_as_in_python(what):
    arguments = backward_arguments(forward_arguments(residual=True, activation="relu"), needs_dresidual=True)
    ops.backward(*arguments)
    for place, value in OTHER_BACKWARDS[what].items():
        arguments[place] = value
    expected = result(IN_PYTHON[ops.backward], arguments)
    for _ in range(2):
        alike(result(ops.backward, arguments), expected)


@pytest.mark.parametrize("way", ["eager", "inductor", "aot_eager"])
def test_compiled_training_calls_them_and_equals_eager(way):
    def training(net, run, inputs):
        found = []
        for x, dy in inputs:
            y = run(x)
            found += [y.detach(), *torch.autograd.grad(y, [x, *net.parameters()], dy)]
        return found + [buffer.clone() for buffer in net.buffers()]

    torch._dynamo.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        brn.BatchRenorm2d(6, activation="relu"), torch.nn.Conv2d(6, 6, 3, padding=1), brn.BatchRenorm2d(6)
    )  # fmt: skip
    inputs = [(torch.randn(4, 6, 5, 3, requires_grad=True), torch.randn(4, 6, 5, 3)) for _ in range(3)]
    with brn.use_backend("native"), inductor_config.patch(force_disable_caches=True):
        other = copy.deepcopy(net)
        run = net if way == "eager" else torch.compile(net, fullgraph=True, backend=way)
        with without_python():
            found = training(net, run, inputs)
        expected = training(other, other, inputs)
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-4)  # of convolutions, too
    torch._dynamo.reset()


def test_the_second_forward_of_checkpointing_in_a_compiled_graph_is_refused():
    """C++ would move the statistics twice."""
    arguments = forward_arguments()
    arguments[15] = True  # traced
    ops.forward(*copied(arguments))
    before = copied(arguments)

    def again(gradient):
        with pytest.raises(RuntimeError, match="activation checkpointing together with torch.compile"):
            ops.forward(*arguments)
        return gradient

    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(again)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0)) and torch.equal(arguments[5], before[5])


def test_new_kinds_are_asked_for_more_and_more_rarely_and_never_beyond_the_limit():
    asked = mock.Mock(return_value=None)
    arguments = forward_arguments()
    expected = result(IN_PYTHON[ops.forward], arguments)
    cpp.module().on_new_kinds(asked, asked, 1)
    counts = []
    for _ in range(20):
        alike(result(ops.forward, arguments), expected)
        counts.append(asked.call_count)
    assert [counts.index(n) + 1 for n in range(1, 6)] == [1, 2, 4, 8, 16] and counts[-1] == 5
    ops.forward(*forward_arguments(torch.float64))
    assert asked.call_count == 5


def test_an_error_of_what_is_asked_is_the_callers():
    asked = mock.Mock(side_effect=KeyError("of the plan"))
    cpp.module().on_new_kinds(asked, asked, 1)
    with pytest.raises(KeyError, match="of the plan"):
        ops.forward(*forward_arguments())
    cpp.module().on_new_kinds(mock.Mock(return_value=3), asked, 1)
    with pytest.raises(SystemError):
        ops.forward(*forward_arguments())


def test_plans_that_are_forgotten_while_they_are_made_are_not_kept():
    def prepare(*arguments):
        cpp.module().forget_operators()
        return cpp.prepare_forward_operator(*arguments)

    asked = mock.Mock(side_effect=prepare)
    cpp.module().on_new_kinds(asked, asked, cpp.MOST_KINDS)
    for count in (1, 2, 3):
        ops.forward(*forward_arguments())
        assert asked.call_count == count


def test_calls_of_another_kind_beside_one_that_has_a_plan():
    """Each in turn, so that one that is taken for another shows."""
    kinds = [
        forward_arguments(),
        forward_arguments(residual=True),
        forward_arguments(residual=True, layouts=("contiguous", "channels_last")),
        forward_arguments(layouts=("channels_last", "contiguous")),
        forward_arguments(activation="relu"),
        forward_arguments(residual=True, activation="relu"),
        forward_arguments(residual=True, activation="relu", traced=True),
        forward_arguments(residual=True, activation="silu"),
        forward_arguments(residual=True, activation="silu", layouts=("contiguous", "channels_last")),
        forward_arguments(torch.float64),
        forward_arguments(torch.bfloat16),
        forward_arguments(affine=False),
        forward_arguments(momentum=None),
        forward_arguments(schedule="auto"),
        forward_arguments(backend="auto"),
        forward_arguments(backend="reference"),
        forward_arguments(shape=(2, 6)),
        forward_arguments(shape=(3, 6)),
    ]
    for needs in ((True, True), (False, False), (True, False), (False, True)):
        for arguments in kinds:
            alike(result(ops.forward, arguments), result(IN_PYTHON[ops.forward], arguments))
            backward = backward_arguments(arguments, "as y", needs[0], needs[1] and arguments[1] is not None)
            alike(result(ops.backward, backward), result(IN_PYTHON[ops.backward], backward))


def test_many_threads_and_kinds_while_plans_are_forgotten():
    """Two locks, Python's and that of the plans, were taken in either order: by freeing a plan, by forgetting all."""
    kinds = []
    for forward in (forward_arguments(dtype, momentum=momentum) for dtype in DTYPES[:2] for momentum in (0.1, None)):
        kinds += [(ops.forward, forward), (ops.backward, backward_arguments(forward, "as y"))]
    expected = [result(IN_PYTHON[operator], arguments) for operator, arguments in kinds]

    def work(n):
        for i in range(1000):
            which = (i + n // 2) % len(kinds)
            alike(result(*kinds[which]), expected[which])

    at_once([functools.partial(work, n) for n in range(4)], cpp.module().forget_operators)


def test_nobody_is_given_bits_of_a_trace():
    forward = forward_arguments(residual=True, activation="relu", traced=True)
    for operator in (ops.forward, IN_PYTHON[ops.forward], torch.ops.brn_kernels.forward.default):
        *_, bits = operator(*copied(forward))
        assert bits.shape == (0,)
    library.opcheck(ops.forward, copied(forward))
    of_group = mock.Mock(return_value=(torch.empty(1), torch.empty(1), torch.empty(1)))
    with mock.patch.object(distributed, "group_of", lambda _: 1), mock.patch.object(distributed, "forward", of_group):
        assert ops.forward_implementation(*copied(forward))[2] is None
        forward[15] = False
        assert ops.forward_implementation(*copied(forward))[2] is not None


FIRST = """
import torch
from brn_kernels import ops
x = torch.randn(4, 6)
arguments = (x, *[None] * 9, [3.0, 5.0, 0.0, 0.0, 0.0], 0.1, 1e-5, None, "native", True)
before = torch._C._dispatch_dump("brn_kernels::forward")
ops.forward(*arguments)
print("operators.cpp" in before, "operators.cpp" in torch._C._dispatch_dump("brn_kernels::forward"))
"""


def test_the_first_operator_that_runs_loads_the_library():
    run = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "True"], run.stdout + run.stderr
