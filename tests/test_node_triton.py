"""Triton's kernels launched in C++: what Python gives, by the launches that Python makes."""

import contextlib
import copy
import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from node_calls import LAYOUTS, asked, in_python, is_in_cpp, laid_out, made
from triton_driver import standing_in

import brn_kernels as brn
from brn_kernels import node

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(node.module() is None, reason="not built: run `brn build`"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu launches them there"),
]

FUSED = st.sampled_from([(False, None), (False, "relu"), (True, "relu"), (True, None), (False, "silu")])
SCHEDULES = {
    "open": brn.ClipSchedule.constant(3.0, 5.0), "narrow": brn.ClipSchedule.constant(1.1, 0.1),
    "closed": brn.ClipSchedule.batchnorm(), "ramps": brn.ClipSchedule(2.0, 3.0, hold=1, r_ramp=4, d_ramp=3),
    "auto": brn.ClipSchedule.auto(), "unclipped": brn.ClipSchedule.unclipped(),
}  # fmt: skip


@pytest.fixture
def driver():
    with brn.use_backend("triton"), standing_in() as driver:
        yield driver


def step(layer, x, extra, dy):
    y = layer(x, extra)
    return y, torch.autograd.grad(y, asked(x, extra, *layer.parameters()), dy)


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def two_steps(make, driver=None):
    """All that the second step gives and leaves behind; in C++, if there is a driver, which says so."""
    layer, *inputs = make()
    if driver is not None:
        x, extra, dy = inputs
        step(copy.deepcopy(layer), x, extra, torch.empty_like(x).copy_(dy))  # launches what C++ launches from now on
    found = []
    for _ in range(2):
        y, gradients = step(layer, *inputs)
        assert driver is None or is_in_cpp(y)
        found += [y.detach(), *gradients, *state(layer).values()]
    return found


@settings(deadline=None, max_examples=12, phases=[Phase.explicit, Phase.generate])  # to shrink takes minutes
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    fused=FUSED, affine=st.booleans(), schedule=st.sampled_from([*SCHEDULES, None]), cumulative=st.booleans(),
    wants=st.tuples(*[st.booleans()] * 4).filter(any),
)  # fmt: skip
@pytest.mark.parametrize("several", [False, True], ids=["one launch", "two launches"])
def test_the_same_bits_as_by_python(request, several, dtype, layouts, fused, affine, schedule, cumulative, wants):
    def make():
        layer, *inputs, dy = made(dtype, layouts[0], *fused, wants, affine)
        layer.schedule = SCHEDULES[schedule or "open"]
        layer.track_running_stats = schedule is not None
        layer.momentum = None if cumulative else 0.1
        return layer, *inputs, laid_out(dy, layouts[1])

    if not asked(*make()[1:3], *make()[0].parameters()):
        return
    if several and "tiny_tiles" not in request.fixturenames:
        request.getfixturevalue("tiny_tiles")
    with brn.use_backend("triton"), standing_in() as driver:
        with in_python():
            expected = two_steps(make)
        found = two_steps(make, driver)
        assert len(driver.launched) >= 2
    for one, another in zip(found, expected, strict=True):
        assert one.dtype == another.dtype and one.stride() == another.stride()
        assert torch.equal(one.nan_to_num(), another.nan_to_num())


@pytest.mark.parametrize("limits", [(1.2, 0.3), (torch.tensor(1.2), torch.tensor(0.3))], ids=["numbers", "tensors"])
def test_the_function_takes_the_same_way(driver, limits):
    layer, x, _, dy = made()

    def call():
        mean, var = torch.zeros(6), torch.ones(6)
        y = brn.batch_renorm(
            x, mean, var, layer.weight, layer.bias, True, 0.1, r_max=limits[0], d_max=limits[1], activation="relu"
        )
        return y, [y.detach(), mean, var, *torch.autograd.grad(y, [x, layer.weight], dy)]

    _, expected = call()
    call()
    y, found = call()
    assert is_in_cpp(y) and all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))


def rows():
    """A layer and its inputs, channels_last; with tiny tiles that is two launches each way."""
    layer, x, extra, dy = made(layout="channels_last")
    return layer, x, extra, laid_out(dy, "channels_last")


def in_cpp(layer, *inputs):
    """Until calls like this one are C++'s."""
    for _ in range(2):
        step(layer, *inputs)
    assert is_in_cpp(layer(*inputs[:2]))


@pytest.mark.parametrize("several", [False, True], ids=["one launch", "two launches"])
def test_launches_are_those_that_python_makes(several, request, driver):
    if several:
        request.getfixturevalue("tiny_tiles")
    layer, *inputs = rows()
    in_cpp(layer, *inputs)
    before = len(driver.compiled)
    driver.launched.clear()
    step(layer, *inputs)
    assert len(driver.compiled) == before  # none went to Triton
    in_cpp_ = list(driver.launched)
    assert len(in_cpp_) == (4 if several else 2)
    with in_python(), mock.patch("brn_kernels.backends.triton.launcher.launch") as spied:
        step(layer, *inputs)
        grids = [call.args[1] for call in spied.call_args_list]
        warps = [call.args[5].values["num_warps"] for call in spied.call_args_list]
    assert [launch[1] for launch in in_cpp_] == [(*grid, 1) for grid in grids]
    assert [launch[2] for launch in in_cpp_] == [(32 * each, 1, 1) for each in warps]
    for function, _, _, shared, stream in in_cpp_:
        assert shared == driver.compiled[function - 1].metadata.shared and stream == driver.stream


@pytest.mark.parametrize("which", ["x", "residual", "running_mean", "weight", "counter", "dy"])
def test_memory_that_is_not_aligned_is_pythons(driver, which):
    layer, *inputs = made(residual=True, activation="relu")
    in_cpp(layer, *inputs)

    def moved(tensor):
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return room[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def changed(layer, x, extra, dy):
        if which == "weight":
            layer.weight.data = moved(layer.weight.data)
        elif which in ("running_mean", "counter"):
            name = "num_batches_tracked" if which == "counter" else which
            layer._buffers[name] = moved(layer._buffers[name])
        return (
            moved(x.detach()).requires_grad_() if which == "x" else x,
            moved(extra.detach()).requires_grad_() if which == "residual" else extra,
            moved(dy) if which == "dy" else dy,
        )

    layer.reset_running_stats()
    other = copy.deepcopy(layer)
    inputs = changed(layer, *inputs)
    driver.launched.clear()
    y, found = step(layer, *inputs)
    assert is_in_cpp(y) == (which == "dy") and len(driver.launched) == (which == "dy")
    changed(other, *inputs)
    with in_python():
        expected = [*step(other, *inputs)[1], *state(other).values()]
    assert all(torch.equal(a, b) for a, b in zip([*found, *state(layer).values()], expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_second_step_is_cpps_in_every_layout(driver, layout):
    layer, x, _, dy = made(layout=layout)
    for was_in_cpp in (False, True):
        y = layer(x)
        assert is_in_cpp(y) == was_in_cpp
        launched = len(driver.launched)
        y.backward(torch.empty_like(y).copy_(dy))
        assert len(driver.launched) == launched + was_in_cpp


def test_a_kernel_that_is_launched_stays_loaded(driver):
    """Newer versions of Triton unload the code of a kernel that nothing refers to."""
    from brn_kernels.backends.triton import launch

    layer, *inputs = made()
    in_cpp(layer, *inputs)
    kernels = [weakref.ref(kernel) for kernel in driver.compiled]
    launch.forget()
    functions, driver.compiled = driver.compiled, None
    del functions
    gc.collect()
    assert kernels and all(kernel() is not None for kernel in kernels)


def test_schedules_beyond_32_bits_are_pythons(driver):
    layer, *inputs = made()
    in_cpp(layer, *inputs)
    layer.schedule = brn.ClipSchedule(hold=2**31)
    assert not is_in_cpp(layer(inputs[0]))
    layer.schedule = brn.ClipSchedule(hold=2**31 - 1)
    assert is_in_cpp(layer(inputs[0]))


def test_settings_that_change_at_each_call_need_no_further_plan(driver):
    layer, x, _, dy = made()
    in_cpp(layer, x, None, dy)
    other = copy.deepcopy(layer)
    for momentum, schedule in ((0.2, SCHEDULES["narrow"]), (0.3, SCHEDULES["closed"]), (1, SCHEDULES["ramps"])):
        for each in (layer, other):
            each.momentum, each.schedule = momentum, schedule
        with mock.patch.object(node, "prepare", side_effect=AssertionError):
            y = layer(x)
        with in_python():
            assert is_in_cpp(y) and torch.equal(y, other(x))
        assert all(torch.equal(a, b) for a, b in zip(state(layer).values(), state(other).values(), strict=True))


def test_a_cumulative_average_beside_a_momentum(driver):
    layer, *inputs = made()
    in_cpp(layer, *inputs)
    layer.momentum = None
    layer.reset_running_stats()
    other = copy.deepcopy(layer)
    for _ in range(3):
        step(layer, *inputs)
        with in_python():
            step(other, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(state(layer).values(), state(other).values(), strict=True))


def test_a_profiler_hears_of_tritons_launches(driver):
    import triton

    layer, x, _, dy = made()
    in_cpp(layer, x, None, dy)
    driver.launched.clear()
    with mock.patch.object(triton.knobs.runtime, "launch_enter_hook", lambda _: None):
        y = layer(x)
        assert not is_in_cpp(y)
        y.backward(dy)
    assert not driver.launched and x.grad is not None
    assert is_in_cpp(layer(x))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_error_of_the_driver_comes_out(driver, direction):
    layer, x, _, dy = made()
    in_cpp(layer, x, None, dy)
    y = layer(x) if direction == "backward" else None
    driver.error = 700
    with pytest.raises(RuntimeError, match="CUDA driver error 700, as the driver says"):
        layer(x) if y is None else y.backward(dy)
    driver.error = 0
    assert torch.is_grad_enabled() and is_in_cpp(layer(x))


@contextlib.contextmanager
def counted_tickets():
    from brn_kernels.backends.triton import launch

    known, asked_for = launch.tickets, []

    def tickets(device, count):
        asked_for.append(count)
        return known(device, count)

    with mock.patch.object(launch, "tickets", tickets):
        yield asked_for


def test_counters_are_asked_for_once_a_stream_and_for_each_captured_call(tiny_tiles, driver):
    with counted_tickets() as asked_for:
        layer, *inputs = rows()
        in_cpp(layer, *inputs)
        step(layer, *inputs)
        asked_for.clear()
        step(layer, *inputs)
        assert asked_for == []
        driver.capturing = 1
        y, captured = step(layer, *inputs)
        assert is_in_cpp(y) and len(asked_for) == 2
        layer.reset_running_stats()
        _, captured = step(layer, *inputs)
        assert len(asked_for) == 4
        driver.capturing = 0
        layer.reset_running_stats()
        _, expected = step(layer, *inputs)
        assert len(asked_for) == 4
        driver.stream += 1
        for _ in range(2):
            step(layer, *inputs)
            assert len(asked_for) == 6
    assert all(torch.equal(one, another) for one, another in zip(captured, expected, strict=True))


def test_kernels_that_were_not_launched_before_are_tritons(driver):
    layer, *inputs = made()
    step(layer, *inputs)
    assert is_in_cpp(layer(inputs[0]))
    wide = laid_out(inputs[0].detach(), "channels_last").requires_grad_()
    assert not is_in_cpp(layer(wide))


def test_kernels_that_are_launched_late_are_cpps_soon_after(driver):
    layer, *inputs = made()
    for _ in range(9):
        assert not is_in_cpp(layer(inputs[0]))
    step(layer, *inputs)
    assert [is_in_cpp(layer(inputs[0])) for _ in range(7)] == [False] * 5 + [True] * 2


def test_many_threads(tiny_tiles, driver):
    layer, *inputs = rows()
    in_cpp(layer, *inputs)
    layer.reset_running_stats()
    expected = step(copy.deepcopy(layer), *inputs)[1]
    results, contexts = [], driver.contexts

    def work():
        for _ in range(5):
            results.append(step(copy.deepcopy(layer), *inputs)[1])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15 and (contexts, driver.contexts) == (1, 4)  # one for each thread
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, expected, strict=True))
