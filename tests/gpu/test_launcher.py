"""Launches that skip what Triton does for each argument must notice all that matters to a compiled kernel."""

import pytest
import torch
from gpu_tools import DEVICE, is_busy, scaled
from triton_calls import assert_same, call, run

from brn_kernels.backends import reference

triton = pytest.importorskip("triton")
from brn_kernels.backends import triton as kernels  # noqa: E402

SHAPE = scaled((8, 64, 16, 16), (2, 4, 3, 2))


def test_after_one_dtype_of_parameters_another():
    arguments = call(DEVICE, SHAPE, dtype=torch.bfloat16, activation="relu")
    first = run(kernels, arguments)
    half = arguments | {name: arguments[name].bfloat16() for name in ("weight", "bias")}
    second = run(kernels, half)
    exact = run(kernels, arguments | {name: half[name].float() for name in ("weight", "bias")})
    assert torch.equal(second["y"], exact["y"]) and not torch.equal(first["y"], second["y"])


def test_after_a_size_another_of_the_same_tile():
    large = ((8, 64, 16, 16), (9, 64, 16, 16), (1, 64, 1, 2), (64, 64, 16, 1), (8, 64, 16, 16))
    for shape in scaled(large, ((2, 4, 3, 2), (3, 4, 3, 2), (1, 4, 1, 2), (2, 4, 3, 2))):
        arguments = call(DEVICE, shape, dtype=torch.float32)
        assert_same(run(kernels, arguments), run(reference, arguments))


@pytest.mark.needs_gpu
def test_on_another_stream():
    arguments = call(DEVICE, (64, 64, 32, 32), dtype=torch.float32)
    expected = run(kernels, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda._sleep(1_000_000_000)  # what runs on the first stream by mistake comes late
    with torch.cuda.stream(stream):
        y, _, _ = kernels.forward(**arguments)
        copied = y.clone()
    assert is_busy(torch.cuda.current_stream()), "the call waited for a stream that is not its own"
    stream.synchronize()
    assert torch.equal(copied, expected["y"])


@pytest.mark.needs_gpu
def test_profilers_hear_of_each_launch():
    arguments, heard = call(DEVICE, (64, 64, 32, 32), dtype=torch.float32), []
    kernels.forward(**arguments)
    kernels.forward(**arguments)
    hook = triton.knobs.runtime.launch_enter_hook
    if not hasattr(hook, "add"):
        pytest.skip("this Triton has one hook, not a chain")

    def hear(metadata):
        heard.append(metadata.get()["name"])

    hook.add(hear)
    try:
        kernels.forward(**arguments)
    finally:
        hook.remove(hear)
    assert heard[0] == "stream_kernel"
