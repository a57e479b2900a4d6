"""How many bytes the Triton kernels read and write, counted element by element in the interpreter."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from triton_calls import CLOSED, LAYOUTS, call, spy

pytest.importorskip("triton")
from brn_kernels.backends import triton as kernels  # noqa: E402
from brn_kernels.backends.triton import launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_kernels")


@dataclasses.dataclass
class Traffic:
    loads: dict[str, int]
    stores: dict[str, int]


@pytest.fixture
def traffic(monkeypatch, device):
    """Counts the elements that interpreted kernels load from and store to each tensor.

    A byte that several threads load at once counts once: packed bits, whose elements two accesses have in float32.
    """
    if device.type != "cpu":
        pytest.skip("counted in the interpreter; on a GPU, ncu counts")
    from triton.runtime import interpreter

    accesses = {"loads": [], "stores": []}

    def counting(method, kind):
        @functools.wraps(method)
        def counted(self, pointers, *rest):
            mask = rest[0] if kind == "loads" else rest[1]
            touched = pointers.data[mask.data.astype(bool)]
            is_byte = pointers.dtype.element_ty.primitive_bitwidth == 8
            accesses[kind].append(np.unique(touched) if kind == "loads" and is_byte else touched)
            return method(self, pointers, *rest)

        return counted

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_masked_load", counting(builder.create_masked_load, "loads"))
    monkeypatch.setattr(builder, "create_masked_store", counting(builder.create_masked_store, "stores"))

    def count(tensors):
        totals = {}
        for kind, addresses in accesses.items():
            totals[kind] = {}
            for name, tensor in tensors.items():
                start = tensor.data_ptr()
                inside = sum(int(((a >= start) & (a < start + tensor.nbytes)).sum()) for a in addresses)
                totals[kind][name] = inside / tensor.numel()
            addresses.clear()
        return Traffic(**totals)

    return count


@LAYOUTS
@pytest.mark.parametrize(
    "schedule, reads_of_x", [([1e9, 1e9, 0.0, 0.0, 0.0], 1), (CLOSED, 2)], ids=["unclipped", "closed"]
)
def test_forward_traffic(launches, traffic, device, channels_last, schedule, reads_of_x):
    """Unclipped: one read and one write. While the limits are closed: two reads and one write; one if held."""
    arguments = call(device, (6, 16, 5, 3), channels_last=channels_last, schedule=schedule)
    y, _, _ = kernels.forward(**arguments)
    seen = traffic({"x": arguments["x"], "y": y})
    assert seen.loads == {"x": 1 if launches == "resident" else reads_of_x, "y": 0}
    assert seen.stores == {"x": 0, "y": 1}


@LAYOUTS
def test_forward_traffic_with_a_residual(launches, traffic, device, channels_last):
    schedule = [1e9, 1e9, 0.0, 0.0, 0.0]
    shape = (6, 16, 4, 4)  # no padding of the bits
    arguments = call(device, shape, channels_last=channels_last, schedule=schedule, residual=True, activation="relu")
    y, _, bits = kernels.forward(**arguments)
    seen = traffic({"x": arguments["x"], "residual": arguments["residual"], "y": y, "bits": bits})
    assert seen.loads == {"x": 1, "residual": 1, "y": 0, "bits": 0}
    assert seen.stores == {"x": 0, "residual": 0, "y": 1, "bits": 1}
    assert bits.numel() * 8 == y.numel()


@pytest.mark.parametrize(
    "channels_last, shape, together",
    [(True, (6, 32, 5, 3), 8), (False, (6, 32, 4, 4), 1), (False, (6, 32, 5, 3), 2)],
    ids=["channels_last", "contiguous", "planes side by side"],
)
def test_only_clipped_channels_are_read_again(launches, traffic, device, channels_last, shape, together):
    """Together with their neighbours where accesses of 16 bytes would not stay whole: 8 values, or a row of planes."""
    arguments = call(device, shape, channels_last=channels_last, schedule=[30.0, 30.0, 0.0, 0.0, 0.0])
    arguments["running_var"][11] = 1e-6  # r is far over its limit there
    arguments["clipped"][11] = True
    y, _, _ = kernels.forward(**arguments)
    assert arguments["clipped"].nonzero().tolist() == [[11]]
    seen = traffic({"x": arguments["x"], "y": y})
    if launches == "resident":
        together = 0
    assert seen.loads["x"] == 1 + together / 32
    assert seen.stores["y"] == (1 + together / 32 if together > 1 else 1)


@LAYOUTS
def test_backward_traffic(launches, traffic, device, channels_last):
    """Four reads and one write; two reads if a program holds its channels."""
    shape = (6, 16, 4, 4)
    arguments = call(device, shape, channels_last=channels_last, residual=True, activation="relu")
    y, saved, bits = kernels.forward(**arguments)
    x, dy = arguments["x"], torch.randn_like(y)
    traffic({})
    dx, _, _, dresidual = kernels.backward(
        dy, x, None, None, arguments["weight"], arguments["bias"], saved, bits, "relu", True, True
    )
    seen = traffic({"x": x, "dy": dy, "bits": bits, "dx": dx, "dresidual": dresidual})
    reads = 1 if launches == "resident" else 2
    assert seen.loads == {"x": reads, "dy": reads, "bits": reads, "dx": 0, "dresidual": 0}
    assert seen.stores == {"x": 0, "dy": 0, "bits": 0, "dx": 1, "dresidual": 1}


def test_two_launches_a_forward_and_no_memory_beyond_the_results(tiny_tiles, monkeypatch, device):
    launches, sizes = [], []
    for name in ("stream_kernel", "repair_kernel"):
        monkeypatch.setattr(launch.kernels_forward, name, spy(getattr(launch.kernels_forward, name), launches))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(empty(*a, **k)) or sizes[-1])
    arguments = call(device, (16, 16, 8, 8))
    kernels.forward(**arguments)
    assert len(launches) == 2
    assert sum(t.numel() for t in sizes) < arguments["x"].numel() / 4
