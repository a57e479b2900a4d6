"""The CUDA kernels on a CPU: compiled as C++, threads as fibers in random order (csrc/emulation)."""

import logging

import emulated
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_calls import SCHEDULE, Case, check, to_channels_last
from oracle import ACTIVATIONS
from test_out_of_memory import Limited

from brn_kernels import backends
from brn_kernels.backends import layout, native, reference, triton

LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulation(device, monkeypatch):
    """Stands in for the library of the native backend. Skips, with the reason, where it cannot be compiled."""
    if device.type != "cpu":
        pytest.skip("an emulation on CPUs: a GPU runs the kernels themselves")
    found = emulated.load()
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setattr(torch.ops, "brn_kernels_native", found.operators, raising=False)
    found.set_multiprocessors(4)
    native._workspace_bytes.cache_clear()
    yield found
    native._workspace_bytes.cache_clear()


def use_multiprocessors(emulation, count):
    emulation.set_multiprocessors(count)
    native._workspace_bytes.cache_clear()  # of one GPU, it never changes


# each a way through the kernels: whole vectors or not, partial tiles and groups, one split or many, planes of one value
SHAPES = [
    (6, 3, 10, 12),
    (3, 5, 7, 7),
    (2, 24, 6, 6),
    (40, 65, 3),
    (9, 130),
    (5, 7, 1, 33),
    (1, 1, 90, 20),
    (33, 8, 2, 2),
    (7, 12, 5),
]


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_every_way_through_the_kernels(shape, channels_last, multiprocessors, emulation):
    use_multiprocessors(emulation, multiprocessors)
    check(Case(shape, torch.float32, channels_last, residual=True, activation="relu"))
    check(Case(shape, torch.float64, channels_last, limits=(1e6, 1e6)))
    check(Case(shape, torch.bfloat16, channels_last, limits=(1.0, 0.0), activation="relu"))
    check(Case(shape, torch.float16, channels_last, residual=True, activation="silu"))


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 20), c=st.sampled_from([1, 2, 3, 7, 8, 16, 33, 64, 96]),
    spatial=st.lists(st.integers(1, 12), max_size=3), channels_last=st.booleans(), dtype=st.sampled_from(DTYPES),
    residual=st.booleans(), activation=st.sampled_from(list(ACTIVATIONS)),
    limits=st.sampled_from([(1.0, 0.0), (1.2, 0.3), (3.0, 5.0), (1e6, 1e6), "auto"]),
    multiprocessors=st.sampled_from([1, 4, 132]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_call(n, c, spatial, channels_last, dtype, residual, activation, limits, multiprocessors, seed, emulation):
    values = n
    for size in spatial:
        values *= size
    if values < 8 or values * c > 30_000:  # of fewer, a variance is noise
        return
    use_multiprocessors(emulation, multiprocessors)
    check(Case((n, c, *spatial), dtype, channels_last, residual, activation, limits, seed))


@LAYOUTS
@pytest.mark.parametrize("shape", [(6, 40, 8, 8), (9, 24, 5, 5), (4, 7, 20, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", [(1.3, 0.4), "auto"], ids=str)
def test_no_bit_depends_on_the_prediction_or_the_order_of_threads(shape, channels_last, dtype, limits):
    case = Case(shape, dtype, channels_last, residual=True, activation="relu", limits=limits)
    right, right_state = case.run(clipped=False)
    wrong, wrong_state = case.run(clipped=True)
    assert 0 < right_state[3].sum() < shape[1], "some clip, some do not"
    for a, b in zip(right + tuple(right_state), wrong + tuple(wrong_state), strict=True):
        assert torch.equal(a, b)


@LAYOUTS
@pytest.mark.parametrize(
    "offset, gap", [(0, 8), (8, 0), (1, 0), (0, 3)], ids=["rows", "start", "odd start", "odd rows"]
)
def test_views_with_gaps_between_rows(channels_last, offset, gap):
    """With NaN between them that must not be read, and that must not be written; aligned, and not."""
    case = Case((4, 16, 8, 8), torch.bfloat16, channels_last, residual=True, activation="relu")
    expected, _ = case.run()
    if channels_last:
        wide = torch.full((4, 8, 8, offset + 16 + gap), float("nan"), dtype=torch.bfloat16)
        view = wide[..., offset : offset + 16].movedim(-1, 1)
    else:
        wide = torch.full((4, offset + 16 + gap, 8, 8), float("nan"), dtype=torch.bfloat16)
        view = wide[:, offset : offset + 16]
    view.copy_(case.x)
    case.x = view
    assert layout.strides_in(view, layout.layout_of(view)) is not None, "used where it lies"
    ours, _ = case.run()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)
    assert wide.isnan().sum() == wide.numel() - view.numel()


@LAYOUTS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_channel_leaves_its_neighbours_alone(bad, channels_last):
    case = Case((4, 30, 6, 6), torch.float32, channels_last, residual=True, activation="relu", limits=(1e6, 1e6))
    (clean, *_), clean_state = case.run()
    case.x[1, 7, 2, 3] = bad
    (y, *_), state = case.run()
    others = [i for i in range(30) if i != 7]
    assert torch.equal(y[:, others], clean[:, others])
    assert y[:, 7].isnan().all()
    assert torch.equal(state[0][others], clean_state[0][others])
    assert state[0][7] == case.running_mean[7] and state[1][7] == case.running_var[7], "its statistics did not move"
    assert state[3][7] and not state[3][others].any()


@LAYOUTS
@pytest.mark.parametrize("clipped", [False, True])
def test_apply_computes_the_same_bits_as_the_forward(channels_last, clipped):
    case = Case((5, 24, 6, 5), torch.float16, channels_last, activation="hardswish")
    coefficients = torch.empty(3, 24)
    state = [case.running_mean, case.running_var, torch.tensor(7), torch.full((24,), clipped)]
    arguments = (case.weight, case.bias, *state, case.limits, SCHEDULE, 0.1, 1e-5, "hardswish")
    y, _, _ = native.forward(case.x, None, None, *arguments, coefficients)
    assert torch.equal(native.apply(case.x, coefficients, "hardswish"), y)


@LAYOUTS
def test_a_first_sample_unlike_all_others_does_not_spoil_the_variance(channels_last):
    """Padding in front: the sums' origin is far from the mean."""
    x = 1000 + torch.randn(300, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x = to_channels_last(x) if channels_last else x
    others = (*[None] * 9, SCHEDULE, 0.1, 1e-5, None)
    _, saved, _ = native.forward(x, *others)
    _, truth, _ = reference.forward(x.double(), *others)
    torch.testing.assert_close(saved.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("failing", ["cudaGetDevice", "cudaSetDevice", "cudaDeviceGetAttribute", "cudaLaunchKernelEx"])
def test_an_error_is_told_once(failing, emulation):
    """What was left in the runtime was taken for the next call's error."""
    case = Case((4, 8, 6, 6), torch.float32)
    with emulation.before(lambda call: emulated.OUT_OF_MEMORY if call == failing else 0):
        with pytest.raises(RuntimeError, match="an emulated error"):
            case.run()
    assert emulation.last_error() == 0
    check(case)


def test_running_out_of_memory_is_pytorchs_error_and_moves_no_statistics():
    """The workspace's came as a RuntimeError."""
    case = Case((4, 8, 6, 6), torch.float32)
    case.run()
    state = [case.running_mean.clone(), case.running_var.clone(), torch.tensor(7), torch.zeros(8, dtype=torch.bool)]
    before = [each.clone() for each in state]
    for after in range(3):  # y, what is saved, the workspace
        with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            Limited(patch, after)
            native.forward(case.x, None, None, None, None, *state, None, SCHEDULE, 0.1, 1e-5, None)
        assert all(map(torch.equal, state, before)), after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_workspace", lambda x, shape: torch.empty(64, dtype=torch.uint8))
        with pytest.raises(RuntimeError, match="workspace: of workspace_bytes bytes"):
            native.forward(case.x, None, None, None, None, *state, None, SCHEDULE, 0.1, 1e-5, None)


class Spied:
    """Counts the launches and blocks so far, and calls back between them."""

    def __init__(self, call_back):
        self.call_back, self.launches, self.blocks = call_back, 0, 0

    def __call__(self, call):
        if call == "cudaLaunchKernelEx":
            self.launches, self.blocks = self.launches + 1, 0
        if call == "block":
            self.call_back(self)
            self.blocks += 1


@LAYOUTS
@pytest.mark.parametrize("when", ["in the first launch", "after the first launch"])
@pytest.mark.parametrize("clips", [False, True], ids=["opens", "closes"])
def test_every_y_is_written_whatever_another_stream_does_to_the_layer(channels_last, when, clips, emulation):
    """A forward of the same layer that finished between two launches, on another stream, left y uninitialized."""
    case = Case((16, 16, 8, 8), torch.float32, channels_last, limits=(1e6, 1e6))
    clipped = torch.zeros(16, dtype=torch.bool)
    clipped[5] = True

    def other_stream(spied):
        if spied.launches == (1 if when == "in the first launch" else 2) and spied.blocks == 1 - (spied.launches - 1):
            clipped[:] = clips

    state = [case.running_mean, case.running_var, torch.tensor(7), clipped]
    others = (case.limits, SCHEDULE, 0.1, 1e-5, None)
    expected, _, _ = native.forward(case.x, None, None, None, None, *(each.clone() for each in state), *others)
    with emulation.before(Spied(other_stream)):
        y, _, _ = native.forward(case.x, None, None, None, None, *state, *others)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_all_kernels_are_there_before_the_first_is_launched(direction, emulation):
    """One that could not be loaded between two launches left statistics moved and no output."""
    case = Case((4, 8, 6, 6), torch.float32)
    (_, saved, bits, *_), _ = case.run()
    state = [case.running_mean.clone(), case.running_var.clone(), torch.tensor(7), torch.zeros(8, dtype=torch.bool)]
    before = [each.clone() for each in state]

    def run(hook):
        with emulation.before(hook):
            if direction == "forward":
                native.forward(case.x, None, None, None, None, *state, case.limits, SCHEDULE, 0.1, 1e-5, None)
            else:
                native.backward(case.dy, case.x, None, None, None, None, saved, bits, None, True, False)

    calls = []
    for failing in range(3):
        calls.clear()

        def hook(call, failing=failing):
            calls.append(call)
            return emulated.OUT_OF_MEMORY if calls.count("cudaFuncGetAttributes") == failing + 1 else 0

        with pytest.raises(RuntimeError, match="an emulated error"):
            run(hook)
        assert all(map(torch.equal, state, before)) and "cudaLaunchKernelEx" not in calls
    calls.clear()
    run(calls.append)
    kernels = [call for call in calls if call in ("cudaFuncGetAttributes", "cudaLaunchKernelEx")]
    assert kernels == ["cudaFuncGetAttributes"] * 3 + ["cudaLaunchKernelEx"] * 3


def test_a_gpu_that_runs_no_kernel_is_passed_over_with_the_reason(emulation, monkeypatch, caplog):
    """`unusable` was content with a library that could be loaded; the first call then failed."""
    monkeypatch.setattr(native, "_load", lambda: {"cpu": None, "cuda": None})
    monkeypatch.setattr(triton, "unusable", lambda device_type: "no triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (5, 2))
    backends._resolve.cache_clear()
    assert native.unusable("cuda") is None
    with emulation.before(lambda call: emulated.NO_KERNEL_IMAGE if call == "cudaFuncGetAttributes" else 0):
        reason = native.unusable("cuda")
        with pytest.raises(RuntimeError, match="cannot run on cuda: an old GPU"):
            backends.resolve("native", "cuda")
        with caplog.at_level(logging.WARNING, logger="brn_kernels"):
            chosen = {backends.resolve("auto", "cuda") for _ in range(3)}
    backends._resolve.cache_clear()
    told = "an old GPU (sm_52): an emulated error (compiled by CUDA 13.0, the driver is for 12.8)"
    assert reason is not None and reason.startswith(told)
    assert chosen == {reference} and len(caplog.records) == 1 and told in caplog.text
    assert emulation.last_error() == 0
