"""The operators in C++ by Triton's kernels, launched on a stand-in for the driver."""

from unittest import mock

import pytest
import torch
from node_calls import LAYOUTS
from operator_calls import IN_PYTHON, alike, backward_arguments, forward_arguments, result, without_python
from triton_driver import standing_in

import brn_kernels as brn
from brn_kernels import cpp, ops

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(cpp.module() is None, reason="not built: run `brn build`"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu launches them there"),
]


@pytest.fixture
def driver():
    with brn.use_backend("triton"), standing_in() as driver:
        yield driver


@pytest.mark.parametrize("several", [False, True], ids=["one launch", "two launches"])
@pytest.mark.parametrize("fused", [(False, None), (True, "relu"), (False, "silu")])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_same_bits_as_in_python(request, several, fused, layout):
    if several:
        request.getfixturevalue("tiny_tiles")
    driver = request.getfixturevalue("driver")
    forward = forward_arguments(torch.float32, (layout, layout), *fused, schedule="ramps", backend="triton")
    backward = backward_arguments(forward, "as y", needs_dresidual=fused[0])
    for operator, arguments in ((ops.forward, forward), (ops.backward, backward)):
        expected = result(operator, arguments)  # by Triton, since nothing has been compiled so far
        alike(expected, result(IN_PYTHON[operator], arguments))
        result(operator, arguments)
        launched = len(driver.launched)
        with without_python():
            alike(result(operator, arguments), expected)
        assert len(driver.launched) - launched in (1, 2)


def test_calls_of_another_kind_beside_one_that_has_a_plan(driver):
    """Each in turn, until all of them are C++'s."""
    kinds = [
        (ops.forward, forward_arguments(momentum=momentum, backend="triton", **fused))
        for momentum in (0.1, None)
        for fused in ({}, {"residual": True, "activation": "relu"})
    ]
    kinds.append((ops.forward, [*kinds[1][1]]))
    kinds[-1][1][15] = True  # traced
    kinds += [
        (ops.backward, backward_arguments(kinds[1][1], "as y", *needs))
        for needs in ((True, True), (True, False), (False, True), (False, False))
    ]
    expected = [result(IN_PYTHON[operator], arguments) for operator, arguments in kinds]
    for _ in range(3):
        launched = len(driver.launched)
        for call, each in zip(kinds, expected, strict=True):
            alike(result(*call), each)
    assert len(driver.launched) - launched >= len(kinds)


def test_forwards_alone_need_no_backward_to_have_run(driver):
    arguments = forward_arguments(backend="triton")
    for _ in range(2):
        expected = result(ops.forward, arguments)
    with without_python():
        alike(result(ops.forward, arguments), expected)


def test_memory_that_is_not_aligned_is_pythons(driver):
    arguments = forward_arguments(backend="triton")
    for _ in range(3):
        expected = result(ops.forward, arguments)
    arguments[0] = torch.cat([torch.zeros(1), arguments[0].flatten()])[1:].view_as(arguments[0])
    assert arguments[0].data_ptr() % 16 != 0
    launched = len(driver.launched)
    alike(result(ops.forward, arguments), expected)
    assert len(driver.launched) == launched


@pytest.mark.parametrize("operator", [ops.forward, ops.backward], ids=str)
def test_while_launches_are_profiled_they_are_pythons(driver, operator):
    arguments = forward_arguments(backend="triton")
    if operator is ops.backward:
        arguments = backward_arguments(arguments, "as y")
    from brn_kernels.backends.triton import launcher

    with mock.patch.object(launcher, "is_profiled", lambda: launched_by_triton):
        launched_by_triton = False
        for _ in range(3):
            expected = result(operator, arguments)
        launched = len(driver.launched)
        launched_by_triton = True
        alike(result(operator, arguments), expected)
        assert len(driver.launched) == launched
