"""How memory that the Triton kernels read and write may lie: far apart, unaligned, with gaps, not as they need it."""

import mmap

import pytest
import torch
from triton_calls import LAYOUTS, assert_same, call, run

from brn_kernels.backends import reference

pytest.importorskip("triton")
from brn_kernels.backends import triton as kernels  # noqa: E402
from brn_kernels.backends.triton import launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_kernels")


@LAYOUTS
def test_y_does_not_share_the_memory_of_x(launches, device, channels_last):
    """A repair reads x again."""
    arguments = call(device, channels_last=channels_last)
    y, _, _ = kernels.forward(**arguments)
    assert y.untyped_storage().data_ptr() != arguments["x"].untyped_storage().data_ptr()


@pytest.mark.parametrize("rows, far", [(2, 2**31 + 32), (9, 2**28)], ids=["rows", "the rows of a tile together"])
@pytest.mark.parametrize("what", ["positions", "channels", "samples"])
def test_64_bit_offsets(nothing_resident, device, what, rows, far):
    """Elements more than 2^31 apart, in memory that is reserved but hardly touched."""

    def spaced(shape, strides, values):
        size = 2 * sum((n - 1) * s + 1 for n, s in zip(shape, strides, strict=True))
        if device.type == "cpu":  # anonymous memory takes room only where it is touched
            memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.bfloat16)
        else:
            memory = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        view = memory.as_strided(shape, strides)
        return view.copy_(values)

    shape, strides = {
        "positions": ((rows, 4), (far, 1)),
        "channels": ((2, rows, 4), (4, far, 1)),
        "samples": ((rows, 2, 4), (far, 4, 1)),
    }[what]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
    upstream = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
    arguments = call(device, shape, dtype=torch.bfloat16, residual=True, activation="relu")
    truth = run(kernels, arguments | {"x": values}, dy=upstream)
    x, dy = spaced(shape, strides, values), spaced(shape, strides, upstream)
    mine = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    y, saved, bits = kernels.forward(**mine | {"x": x})
    dx, dweight, _, dresidual = kernels.backward(
        dy, x, None, None, mine["weight"], mine["bias"], saved, bits, "relu", True, True
    )  # fmt: skip
    for name, found in {"y": y, "saved": saved, "dx": dx, "dweight": dweight, "dresidual": dresidual}.items():
        torch.testing.assert_close(found, truth[name])  # tiles are smaller, and sums rounded otherwise


@LAYOUTS
@pytest.mark.parametrize("start", [0, 1, 3])
def test_unaligned_rows(launches, device, channels_last, start):
    """Odd row lengths and starts: no access may assume 16 bytes."""
    arguments = call(device, (5, 7, 3, 3), dtype=torch.float32, channels_last=channels_last)
    x = arguments["x"]
    storage = torch.zeros(x.numel() + start, device=device)
    shifted = storage[start:].as_strided(x.shape, x.stride())
    shifted.copy_(x)
    assert (shifted.data_ptr() % 16 > 0) == (start > 0)
    assert_same(run(kernels, arguments | {"x": shifted}), run(reference, arguments))


def test_values_per_channel_that_do_not_lie_side_by_side(launches, device):
    """Kernels that took them for dense wrote means into the neighbours, and past the end."""
    arguments = call(device, (6, 5, 4), weight=None, bias=None)
    table = torch.full((5, 6), 7.0, dtype=torch.float64, device=device)
    spaced = dict(zip(("running_mean", "running_var", "weight", "bias"), table[:, :5].unbind(1), strict=False))
    for name, value in spaced.items():
        value.copy_(arguments[name] if arguments[name] is not None else torch.rand(5) + 0.5)
    flags = torch.zeros(5, 3, dtype=torch.bool, device=device)
    dense = arguments | {name: value.clone() for name, value in spaced.items()}
    truth = run(reference, dense)
    y, saved, bits = kernels.forward(**arguments | spaced | {"clipped": flags[:, 1]})
    found = {"y": y, "saved": saved, "running_mean": spaced["running_mean"], "running_var": spaced["running_var"]}
    assert_same(found | {"clipped": flags[:, 1]}, {name: truth[name] for name in (*found, "clipped")})
    assert table[:, 4:].eq(7.0).all() and not flags[:, 0].any() and not flags[:, 2].any()


@pytest.mark.parametrize("what", ["x", "residual", "dy", "what is computed from x"])
def test_memory_that_does_not_fit_is_copied(launches, device, what):
    """Into the layout of x; results come as ``torch.empty_like(x)`` lies."""
    arguments = call(device, (6, 10, 4), residual=True, activation="relu", channels_last=False)
    dy = torch.randn(arguments["x"].shape, dtype=torch.float64, device=device)
    everything = arguments | {"dy": dy}
    if what == "what is computed from x":  # rows of channels with gaps; such 3-d tensors PyTorch makes contiguous
        wide = torch.randn(6, 4, 20, dtype=torch.float64, device=device).movedim(-1, 1)
        everything["x"] = wide[:, :10]
        assert torch.empty_like(everything["x"]).stride() != wide.clone()[:, :10].stride()
    else:
        everything[what] = torch.stack([everything[what]] * 2, dim=-1)[..., 0]  # every other value
        assert everything[what].stride(-1) == 2
    dy = everything.pop("dy")
    ours, truth = run(kernels, everything, dy), run(reference, everything, dy)
    assert_same(ours, truth)
    for name in ("y", "dx", "dresidual"):
        assert ours[name].stride() == torch.empty_like(everything["x"]).stride(), name
    given = run(kernels, everything | {"coefficients": torch.empty(3, 10, dtype=torch.float64, device=device)}, dy)
    assert torch.equal(given["y"], ours["y"])


def test_y_is_computed_again_where_memory_does_not_fit(launches, device):
    arguments = call(device, (6, 10, 4), channels_last=False)
    arguments["x"] = torch.stack([arguments["x"]] * 2, dim=-1)[..., 0]
    coefficients = torch.empty(3, 10, dtype=torch.float64, device=device)
    y, _, _ = kernels.forward(**arguments, coefficients=coefficients)
    again = kernels.apply(arguments["x"], coefficients, None)
    assert torch.equal(again, y) and again.stride() == y.stride()


def test_planes_beyond_32_bit_columns_are_not_fused():
    x = torch.empty(1, 1, 2**31, dtype=torch.bfloat16, device="meta")
    assert not launch.is_fused(x, None, None, None)
