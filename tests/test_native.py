"""What only the compiled CPU loops can get wrong: instruction sets, threads, splits, tails, memory."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_calls import SCHEDULE, Case, check, to_channels_last
from oracle import ACTIVATIONS
from tolerances import UNITS

import brn_kernels
from brn_kernels.backends import layout, native, reference

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512bf16")


@pytest.fixture(autouse=True)
def built(device):
    """Skips, with the reason, where the native backend cannot run."""
    if device.type != "cpu":
        pytest.skip("about the CPU loops")
    if reason := native.unusable("cpu"):
        pytest.skip(reason)


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# each a way through the loops: rows joined or not, partial groups, several splits, one channel, few channels
SHAPES = [
    (40, 3, 50, 50), (1, 3, 130, 129), (2, 1, 200, 190), (16, 64, 28, 28), (3, 65, 12, 11), (33, 24, 7, 7), (5, 130, 9),
    (4, 2100, 3), (70, 4100), (9000, 5), (2, 17, 3, 5, 7), (1, 2, 300, 301), (4, 200, 1, 48), (3, 8, 8), (600, 100),
    (20, 90, 7, 9), (18, 130, 59),
]  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2], ids=["1 thread", "2 threads"])
def test_every_way_through_the_loops(shape, channels_last, count, threads):
    threads(count)
    check(Case(shape, torch.float32, channels_last, residual=True, activation="relu"))
    check(Case(shape, torch.float64, channels_last, limits=(1e6, 1e6)))
    check(Case(shape, torch.bfloat16, channels_last, limits=(1.0, 0.0), activation="relu"))
    check(Case(shape, torch.float32, channels_last, limits="auto"))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40), c=st.sampled_from([1, 2, 3, 7, 8, 16, 33, 64, 96, 129]),
    spatial=st.lists(st.integers(1, 15), max_size=3), channels_last=st.booleans(),
    dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16"]), residual=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    limits=st.sampled_from([(1.0, 0.0), (1.2, 0.3), (3.0, 5.0), (1e6, 1e6), "auto"]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_call(n, c, spatial, dtype, channels_last, residual, activation, limits, seed):
    values = n
    for size in spatial:
        values *= size
    if values < 8 or values * c > 500_000:  # of fewer, a variance is noise
        return
    check(Case((n, c, *spatial), getattr(torch, dtype), channels_last, residual, activation, limits, seed))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(16, 40, 30, 30), (9, 24, 5, 5), (8, 7, 90, 90), (20, 90, 7, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limits", [(1.3, 0.4), "auto"], ids=str)
def test_no_bit_depends_on_the_prediction(shape, channels_last, dtype, limits, threads):
    threads(2)
    case = Case(shape, dtype, channels_last, residual=True, activation="relu", limits=limits)
    right, right_state = case.run(clipped=False)
    wrong, wrong_state = case.run(clipped=True)
    assert 0 < right_state[3].sum() < shape[1], "some clip, some do not"
    for a, b in zip(right + tuple(right_state), wrong + tuple(wrong_state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 2])
def test_same_threads_same_bits(count, threads):
    threads(count)
    for channels_last in (False, True):
        case = Case((12, 5, 70, 70), torch.float32, channels_last, residual=True, activation="relu")
        first, _ = case.run()
        for _ in range(5):
            again, _ = case.run()
            assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(name):
    """In a process of its own: which one runs is decided once."""
    program = (
        "import torch, pytest, sys\n"
        "from brn_kernels.backends import native\n"
        "assert native.unusable('cpu') is None\n"
        "try: print(torch.ops.brn_kernels_native.instruction_set())\n"
        "except RuntimeError as error: assert 'has no such loops' in str(error); sys.exit(77)\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))\n"
    )
    here, package = os.path.dirname(__file__), os.path.dirname(os.path.dirname(brn_kernels.__file__))
    tests = [
        f"{os.path.join(here, 'test_native.py')}::{test}" for test in ("test_any_call", "test_half_values_survive")
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *tests, "--rootdir", here],
        env=os.environ | {"BRN_KERNELS_ISA": name, "PYTHONPATH": package}, cwd=here, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(f"this processor, or this build, has no {name}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_values_survive(dtype):
    """Every finite pattern up to 1e15 in, times a weight, rounded to nearest even as PyTorch does; subnormals too."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else 0.0  # bfloat16's may be flushed
    size = x.float().abs()
    x = x[(size <= 1e15) & ((size == 0) | (size >= smallest))].view(1, 1, -1)
    limits = torch.tensor([1e30, 1e30])
    for factor in (1.0, 1.0 + 2**-9, 0.7):
        mean, var, weight = torch.zeros(1), torch.ones(1) - 1e-5, torch.tensor([factor])
        y, _, _ = native.forward(
            x, None, None, weight, None, mean, var, torch.tensor(0), None, limits, SCHEDULE, 0.0, 1e-5, None
        )
        expected = (x.float() * (weight / torch.sqrt(var + torch.tensor(1e-5)))).to(dtype)
        keep = (expected == 0) | (expected.abs() >= smallest)
        assert torch.equal(y[keep], expected[keep])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_views_with_gaps_between_rows(channels_last):
    """Rows that start anywhere, with NaN between them that must not be read, and numbers that must not be written."""
    case = Case((6, 20, 9, 10), torch.float32, channels_last)
    expected, _ = case.run()
    wide = torch.full((6, 25, 9, 10) if not channels_last else (6, 9, 10, 25), float("nan"))
    view = wide[:, 3:23] if not channels_last else wide[..., 3:23].movedim(-1, 1)
    view.copy_(case.x)
    case.x = view
    assert layout.strides_in(view, layout.layout_of(view)) is not None, "used where it lies"
    ours, _ = case.run()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert wide.isnan().sum() == wide.numel() - view.numel()


def test_large_results_past_the_caches(threads):
    """Results over a quarter of the last cache are streamed; here with rows that do not start on a line."""
    threads(2)
    for channels_last in (False, True):
        case = Case((4, 96, 150, 151), torch.float32, channels_last, activation="relu")
        check(case)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
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


def test_parameters_of_any_dtype():
    case = Case((4, 6, 8, 8), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        mean, var = case.running_mean.to(dtype), case.running_var.to(dtype)
        arguments = (case.x, None, None, case.weight.to(dtype), case.bias.to(dtype))
        others = (torch.tensor(0), torch.zeros(6, dtype=torch.bool), None, SCHEDULE, 0.1, 1e-5, None)
        ours, theirs = [mean.clone(), var.clone()], [mean.clone(), var.clone()]
        y, *_ = native.forward(*arguments, *ours, *others)
        expected, *_ = reference.forward(*arguments, *theirs, *others)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours, theirs)


def test_a_variance_too_large_for_its_dtype_is_not_stored():
    x = torch.randn(64, 1, 4) * 2000
    var = torch.ones(1, dtype=torch.float16)
    native.forward(
        x, None, None, None, None, torch.zeros(1), var, torch.tensor(0), None, None, SCHEDULE, 0.9, 1e-5, None
    )
    assert var.item() == 1


@pytest.mark.parametrize("shape", [(20000, 8, 3), (6000, 2, 7, 7), (70000, 3)], ids=str)
@pytest.mark.parametrize("gap", [False, True], ids=["dense", "with gaps"])
def test_sums_of_very_many_equal_values_do_not_drift(shape, gap, threads):
    """A float32 sum of 0.1, term by term, is off by 1e-4 after as many terms as here."""
    threads(1)
    x = torch.randn(*shape[:-1], shape[-1] + 1)[..., :-1] if gap else torch.randn(shape)
    dy = torch.full(shape, 0.1)
    saved = torch.stack([torch.zeros(shape[1]), torch.ones(shape[1]), torch.ones(shape[1]), torch.zeros(shape[1])])
    _, dweight, dbias, _ = native.backward(dy, x, None, None, None, None, saved, None, None, True, False)
    dims = [i for i in range(x.dim()) if i != 1]
    torch.testing.assert_close(dbias.double(), dy.double().sum(dims), rtol=UNITS * 2**-23, atol=0)
    truth = (dy.double() * x.double()).sum(dims)
    assert (dweight.double() - truth).abs().max() <= UNITS * 2**-23 * (dy.double() * x.double().abs()).sum(dims).max()


@pytest.mark.parametrize("shape", [(5000, 2, 7, 7), (5000, 2, 4), (300, 2, 70, 70), (5000, 2)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_first_sample_unlike_all_others_does_not_spoil_the_variance(shape, channels_last, threads):
    """Padding in front: the sums' origin is far from the mean."""
    threads(1)
    x = 1000 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x = to_channels_last(x) if channels_last else x
    others = (None, None, None, None, None, None, SCHEDULE, 0.1, 1e-5, None)
    _, saved, _ = native.forward(x, None, None, None, *others[:6], *others[6:])
    _, truth, _ = reference.forward(x.double(), None, None, None, *others[:6], *others[6:])
    torch.testing.assert_close(saved.double(), truth, rtol=1e-4, atol=1e-6)


def test_silu_of_the_very_large():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    huge = torch.tensor([-3e38, -float("inf"), 3e38, float("inf"), -200.0, float("nan"), 90.0, -90.0]).view(1, 1, 8)
    residual = huge.expand(2, 1, 8)
    x = x.expand(2, 1, 8).contiguous()
    others = (None, None, None, None, None, None, None, SCHEDULE, 0.1, 1e-5, "silu")
    ours, _, _ = native.forward(x, residual, None, *others)
    theirs, _, _ = reference.forward(x, residual, None, *others)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_cumulative_average_without_a_counter_is_refused():
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="a cumulative average needs num_batches_tracked"):
        native.forward(x, None, None, None, None, mean, var, None, None, None, SCHEDULE, None, 1e-5, None)


def test_a_clipped_buffer_of_another_size_is_refused():
    x, mean, var = torch.randn(4, 64), torch.zeros(64), torch.ones(64)
    clipped = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="clipped: bool, one for each channel"):
        native.forward(x, None, None, None, None, mean, var, torch.tensor(0), clipped, None, SCHEDULE, 0.1, 1e-5, None)
    assert torch.equal(mean, torch.zeros(64))
