"""What is particular to the Triton kernels; the common suite runs over them too.

Without a GPU the kernels are interpreted. Tiles are made tiny where a test is about several of them.
"""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from oracle import ACTIVATIONS
from triton_calls import CLOSED, LAYOUTS, assert_same, call, layout_like, run, spy

from brn_kernels.backends import layout, reference

pytest.importorskip("triton")
from brn_kernels.backends import triton as kernels  # noqa: E402
from brn_kernels.backends.triton import config, kernels_backward, kernels_forward, launch, tickets  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_kernels")


# -- tiles and splits


@LAYOUTS
@pytest.mark.parametrize("activation, residual", [(None, False), ("relu", True), ("silu", False)], ids=str)
@pytest.mark.parametrize(
    "shape", [(37, 19), (9, 11, 5, 3), (3, 2, 41), (70, 1, 2), (2, 9, 3, 5, 2)], ids=lambda s: "x".join(map(str, s))
)
def test_several_tiles_and_splits(tiny_tiles, device, channels_last, activation, residual, shape):
    arguments = call(device, shape, channels_last=channels_last, activation=activation, residual=residual)
    arguments["clipped"] = (torch.arange(shape[1]) % 3 == 0).to(device)
    assert_same(run(kernels, arguments), run(reference, arguments))


@LAYOUTS
def test_nan_of_silu_beyond_the_tensor_had_spoiled_whole_channels(launches, device, channels_last):
    """What is read as 0 there is so many standard deviations (of eps alone) from the mean that float32 overflows."""
    arguments = call(device, (3, 2, 3, 3), torch.float32, channels_last, activation="silu", schedule=CLOSED)
    arguments["x"].fill_(2.0**122)  # whose sums are exact: the variance is 0
    ours, truth = run(kernels, arguments), run(reference, arguments)
    for name in ("dx", "dweight", "dbias"):
        assert truth[name].isfinite().all() and ours[name].isfinite().all(), name


# -- prediction


@LAYOUTS
@pytest.mark.parametrize("activation, residual", [(None, False), ("relu", True)], ids=["plain", "residual and relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_prediction(launches, device, channels_last, activation, residual, dtype):
    arguments = call(device, dtype=dtype, channels_last=channels_last, activation=activation, residual=residual)
    clipped = run(reference, arguments)["clipped"]
    assert clipped.any() and not clipped.all()
    predictions = {
        "right": clipped,
        "wrong": ~clipped,
        "never clipped": torch.zeros_like(clipped),
        "always clipped": torch.ones_like(clipped),
        "stale": (torch.arange(len(clipped)) % 2 == 0).to(device),
        "absent": None,
    }
    results = {name: run(kernels, arguments | {"clipped": flags}) for name, flags in predictions.items()}
    for name, result in results.items():
        for key in ("y", "saved", "bits", "running_mean", "running_var", "dx", "dweight"):
            assert key == "bits" and not residual or torch.equal(result[key], results["right"][key]), (name, key)
        assert (result["bits"] is not None) == residual
        assert name == "absent" or torch.equal(result["clipped"], clipped), name


# -- tickets


@LAYOUTS
def test_counters_are_left_at_zero(launches, monkeypatch, device, channels_last):
    """They are shared by all launches of a stream: a counter left standing would break the next."""
    counters = torch.zeros(4096, dtype=torch.int32, device=device)
    monkeypatch.setattr(launch, "tickets", lambda *_: counters)
    arguments = call(device, channels_last=channels_last, residual=True, activation="relu")
    first = run(kernels, arguments)
    assert not counters.any()
    second = run(kernels, arguments)
    assert not counters.any()
    assert all(torch.equal(first[name], second[name]) for name in ("y", "dx", "dweight"))


def test_counters_are_kept_when_more_are_needed(monkeypatch):
    """Launches that wait on their stream still count in the old ones, and nothing else would keep those."""
    stream = iter(range(100, 200))
    monkeypatch.setattr(tickets, "_counters", {})
    monkeypatch.setattr(tickets, "_reserves", {})
    monkeypatch.setattr(tickets, "_outgrown", [])
    monkeypatch.setattr(tickets, "_lasting_zeros", lambda _, count: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    gpu = torch.device("cuda", 0)
    few = weakref.ref(tickets.tickets(gpu, 5))
    assert tickets.tickets(gpu, 7) is few()
    more = tickets.tickets(gpu, 10_000)
    assert more.numel() >= 10_000 and tickets.tickets(gpu, 5) is more
    gc.collect()
    assert few() is not None
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: next(stream), raising=False)
    assert tickets.tickets(gpu, 5) is not tickets.tickets(gpu, 5)


# -- bundles of splits


@pytest.fixture
def bundles(tiny_tiles, monkeypatch, device):
    """Partial results are merged two at a time, however few there are; counters begin at zero and are watched."""
    counters = torch.zeros(4096, dtype=torch.int32, device=device)
    monkeypatch.setattr(config, "DIRECT_TRIPS", 0)
    monkeypatch.setattr(config.Launch, "merge_rows", lambda *_: 2)
    monkeypatch.setattr(launch, "tickets", lambda _, count: counters[:count])
    return counters


@LAYOUTS
@pytest.mark.parametrize("outer", [45, 70, 120], ids=lambda n: f"{n} rows")
def test_partial_results_are_merged_in_bundles(bundles, device, channels_last, outer):
    arguments = call(device, (outer, 7, 5), channels_last=channels_last, activation="relu")
    arguments["x"][outer // 2 :] += 3  # splits do not agree
    shape = layout.Layout(channels_last, outer * (5 if channels_last else 1), 7, 7 if channels_last else 5)
    it = config.launch_for("forward", shape, 8, (7,) if channels_last else (35, 5), 7)
    assert it.splits > it.bundle(8) == 2
    assert_same(run(kernels, arguments), run(reference, arguments))
    assert not bundles.any()


@LAYOUTS
@pytest.mark.parametrize("split", [0, 1, 5], ids=lambda n: f"split {n}")
def test_y_is_written_where_the_programs_of_a_channel_predict_differently(
    bundles, monkeypatch, device, channels_last, split
):
    """They do if the layer runs on another stream meanwhile: what some of them left out was never written."""
    if device.type != "cpu":
        pytest.skip("the kernel is changed, which only the interpreter notices")
    predict = kernels_forward.prediction

    def torn(*arguments):
        pivot, scale, shift, predicted = predict(*arguments)
        return pivot, scale, shift, predicted * 0 if launch.tl.program_id(1) == split else predicted

    monkeypatch.setattr(kernels_forward, "prediction", torn)
    arguments = call(device, (45, 7, 5), channels_last=channels_last, schedule=[3.0, 5.0, 0.0, 0.0, 0.0])
    assert_same(run(kernels, arguments), run(reference, arguments))  # where nothing is written there are NaNs


# -- one launch


@LAYOUTS
@pytest.mark.parametrize("activation, residual", [(None, False), ("relu", True), ("hardswish", False)], ids=str)
def test_one_launch_gives_what_two_give(launches, monkeypatch, device, channels_last, activation, residual):
    arguments = call(
        device, (30, 7, 5, 3), channels_last=channels_last, activation=activation, residual=residual
    )  # fmt: skip
    arguments["clipped"] = (torch.arange(7) % 3 == 0).to(device)
    expected, launched = run(reference, arguments), []
    for module, names in (
        (kernels_forward, ("stream_kernel", "repair_kernel", "resident_forward_kernel")),
        (kernels_backward, ("reduce_kernel", "apply_kernel", "alone_kernel", "resident_backward_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, spy(getattr(module, name), launched))
    assert_same(run(kernels, arguments), expected)
    assert len(launched) == (4 if launches == "two launches" else 2)


# -- automatic limits


@LAYOUTS
@pytest.mark.parametrize("momentum", [0.1, None, 0.0], ids=str)
def test_automatic_limits(launches, device, channels_last, momentum):
    """Open and closed channels, some clipped; the state's update."""
    arguments = call(device, (30, 7, 5, 3), channels_last=channels_last, momentum=momentum, schedule=CLOSED)
    state = torch.rand(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state[0] = torch.tensor([0, 1, 9, 10, 30, 49, 200])
    state[3:] *= torch.logspace(-4, 0, 7)
    arguments["x"][:, 5, 0, 0] = float("nan")
    states = [state.clone().to(device) for _ in range(2)]
    for _ in range(3):
        others = {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        ours = kernels.forward(**arguments, auto_state=states[0])
        truth = reference.forward(**others, auto_state=states[1])
        for name in ("running_mean", "running_var", "clipped", "num_batches_tracked"):
            assert torch.allclose(arguments[name].double(), others[name].double(), rtol=1e-12), name
        assert torch.allclose(ours[0], truth[0], rtol=1e-10, atol=1e-10, equal_nan=True)
        assert torch.allclose(ours[1], truth[1], rtol=1e-10, atol=1e-10, equal_nan=True)
        assert torch.allclose(states[0], states[1], rtol=1e-12) and states[0][0, 5] == 49
    assert states[0][0].tolist() == [3, 4, 12, 13, 33, 49, 203]


# -- what is needed


@LAYOUTS
@pytest.mark.parametrize("needs_dx, needs_dresidual", [(False, False), (True, False), (False, True)])
def test_only_the_gradients_that_are_needed(launches, device, channels_last, needs_dx, needs_dresidual):
    arguments = call(device, channels_last=channels_last, residual=True, activation="relu")
    wanted = {"needs_dx": needs_dx, "needs_dresidual": needs_dresidual}
    ours, truth = run(kernels, arguments, **wanted), run(reference, arguments, **wanted)
    assert_same(ours, truth)
    assert (ours["dx"] is not None, ours["dresidual"] is not None) == (needs_dx, needs_dresidual)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in (None, "relu")])
def test_what_is_not_fused_is_composed(device, activation):
    arguments = call(device, residual=True, activation=activation)
    assert not launch.is_fused(arguments["x"], arguments["residual"], None, activation)
    assert_same(run(kernels, arguments), run(reference, arguments))


@LAYOUTS
def test_one_backend_runs_the_backward_of_the_others_forward(device, channels_last):
    arguments = call(device, channels_last=channels_last, residual=True, activation="relu")
    truth = run(reference, arguments)

    class Mixed:
        forward = staticmethod(kernels.forward)
        backward = staticmethod(reference.backward)

    class MixedOtherWay:
        forward = staticmethod(reference.forward)
        backward = staticmethod(kernels.backward)

    assert_same(run(Mixed, arguments), truth)
    assert_same(run(MixedOtherWay, arguments), truth)


# -- packed bits


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels, size", [(16, (4, 4)), (12, (2, 6)), (6, (5, 2)), (11, (3, 7))], ids=str)
def test_packed_bits_are_the_signs_of_y(launches, device, channels_last, dtype, channels, size):
    """Of accesses of 8, 4, 2 and 1 elements, which are packed apart and make one byte together."""
    arguments = call(device, (9, channels, *size), dtype, channels_last, residual=True, activation="relu")
    arguments["x"][0, 0], arguments["x"][1, 1, 0, 0] = 1e4, float("nan")  # a clipped channel; NaN is let pass
    y, _, bits = kernels.forward(**arguments)
    assert torch.equal(bits, layout.pack_bits(~(y <= 0), arguments["x"]))
    assert 0.2 < layout.unpack_bits(bits, y).double().mean() < 0.8


# -- numbers


@LAYOUTS
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_a_mean_far_from_zero_costs_no_digits(launches, device, channels_last, mean):
    """Sums about the first item's mean: E[x^2] - E[x]^2 would give noise here, or a negative variance."""
    x = torch.randn(700, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    arguments = call(device, (700, 9, 5), dtype=torch.float32, channels_last=channels_last, momentum=1.0)
    arguments["x"] = layout_like(arguments["x"], (x + mean).float().to(device))
    kernels.forward(**arguments)
    truth = arguments["x"].double().var((0, 2))
    error = (arguments["running_var"].double() - truth).abs().max().item()
    assert error < 1e-5 + (mean * torch.finfo(torch.float32).eps) ** 2  # the mean itself is rounded


@LAYOUTS
def test_a_first_item_unlike_the_others_costs_few_digits(tiny_tiles, device, channels_last):
    """The worst case for the sums about the first item's mean."""
    x = torch.randn(600, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x[:8] += 1000
    arguments = call(device, (600, 2, 3), dtype=torch.float32, channels_last=channels_last, momentum=1.0)
    arguments["x"] = layout_like(arguments["x"], x.float().to(device))
    kernels.forward(**arguments)
    truth = arguments["x"].double().var((0, 2))
    assert torch.allclose(arguments["running_var"].double(), truth, rtol=1e-4)


# -- where it does not run


def in_a_new_process(code, **environment):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_it_says_why():
    run_ = in_a_new_process("import brn_kernels as brn; brn.use_backend('triton')")
    assert "RuntimeError: backend 'triton' cannot run here: its kernels run on NVIDIA GPUs, not on cpu" in run_.stderr


def test_without_triton_it_says_why():
    run_ = in_a_new_process(
        "import sys; sys.modules['triton'] = None; import brn_kernels as b; b.use_backend('triton')"
    )
    assert "RuntimeError: backend 'triton' cannot run here" in run_.stderr and "triton" in run_.stderr


@pytest.mark.parametrize("environment", [{}, {"TRITON_INTERPRET": "1"}], ids=str)
def test_interpreted_kernels_are_used_only_by_name(environment):
    """Whole models on interpreted kernels take minutes a step."""
    code = "import brn_kernels as brn; print(brn.backends.resolve('auto', 'cpu').__name__)"
    assert not in_a_new_process(code, **environment).stdout.strip().endswith(".triton")


@LAYOUTS
def test_one_huge_value_gives_what_the_reference_gives(launches, device, channels_last):
    """inf - inf in the variance made the whole channel NaN."""
    arguments = call(device, (6, 9, 4), dtype=torch.float32, channels_last=channels_last)
    arguments["x"][1, 2, 1] = 1e30
    ours, truth = run(kernels, arguments), run(reference, arguments)
    assert truth["y"].isfinite().all() and ours["y"].isfinite().all()
    assert torch.equal(ours["running_var"] == 1, truth["running_var"] == 1)
    assert torch.equal(ours["clipped"], truth["clipped"])


@LAYOUTS
def test_nan_gives_what_the_reference_gives(launches, device, channels_last):
    arguments = call(device, (6, 9, 4), channels_last=channels_last)
    arguments["x"][1, 2, 1] = float("nan")
    ours, truth = run(kernels, arguments), run(reference, arguments)
    for name, expected in truth.items():
        found = ours[name]
        if expected is None:
            assert found is None, name
        elif expected.is_floating_point():
            assert torch.equal(found.isnan(), expected.isnan()), name
        else:
            assert torch.equal(found, expected), name


def test_one_value_a_channel_updates_no_statistic(launches, device):
    """The functions refuse it; the operators are there for everyone."""
    arguments = call(device, (1, 9))
    kernels.forward(**arguments)
    assert not arguments["running_mean"].any() and not arguments["clipped"].any()
    assert arguments["num_batches_tracked"].item() == 6
