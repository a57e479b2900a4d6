"""Planes that accesses of 16 bytes do not divide, side by side in a row: 7 x 7 in the contiguous layout."""

import pytest
import torch
from triton_calls import CLOSED, assert_same, call, run

from brn_kernels.backends import layout, reference

pytest.importorskip("triton")
from brn_kernels.backends import triton as kernels  # noqa: E402
from brn_kernels.backends.triton import config  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_kernels", "nothing_resident")


@pytest.mark.parametrize(
    "activation, residual", [(None, False), ("relu", False), ("silu", False), (None, True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 16, 5, 3), (9, 16, 7, 7)], ids=lambda s: "x".join(map(str, s)))
def test_planes_side_by_side(request, device, shape, dtype, activation, residual):
    """Planes that accesses of 16 bytes do not divide; also with several splits, which ``tiny_tiles`` makes."""
    if shape[2] == 5:
        request.getfixturevalue("tiny_tiles")
    x = torch.empty(shape, dtype=dtype)
    strides = x.stride()[:2]
    chosen = config.launch_for("forward", layout.layout_of(x), x.itemsize, strides, config.multiprocessors_of(device))
    assert chosen.tile_channels == 16 // x.itemsize and chosen.channel_tiles > 1
    assert chosen.splits > 1 or shape[2] == 7 or dtype == torch.float64
    arguments = call(device, shape, dtype, False, residual, activation)
    arguments["clipped"] = (torch.arange(shape[1]) % 3 == 0).to(device)
    assert_same(run(kernels, arguments), run(reference, arguments))
    arguments["weight"] = arguments["bias"] = arguments["clipped"] = None
    assert_same(run(kernels, arguments | {"schedule": CLOSED}), run(reference, arguments | {"schedule": CLOSED}))


@pytest.mark.parametrize(
    "channels, strides, has_bits",
    [(8, (120, 15), True), (6, (96, 15), False), (8, (120, 30), False), (8, (121, 15), False), (8, (0, 0), False)],
    ids=["packed bits", "channels left over", "planes apart", "rows not aligned", "expanded"],
)
def test_which_planes_do_not_lie_side_by_side(channels, strides, has_bits):
    planes, fitting = layout.Layout(False, 6, channels, 15), (120, 15)
    chosen = config.launch_for("forward", planes, 4, (*fitting, *strides), 132, has_bits=has_bits)
    assert not chosen.channels_last and chosen.tile_channels == 1
    assert config.launch_for("forward", planes._replace(channels=8), 4, (*fitting, *fitting), 132).tile_channels == 4


@pytest.mark.parametrize(
    "what", ["packed bits", "planes apart", "rows not aligned", "expanded", "gradient expanded", "few channels"]
)
def test_planes_that_cannot_lie_side_by_side(device, what):
    arguments = call(device, (6, 8, 5, 3), torch.float32, False)
    x, dy = arguments["x"], torch.randn(6, 8, 5, 3, device=device)
    if what == "packed bits":
        arguments = call(device, (6, 8, 5, 3), torch.float32, False, residual=True, activation="relu")
    elif what == "planes apart":
        arguments["x"] = torch.stack([x, x], 2)[:, :, 0]
    elif what == "rows not aligned":
        arguments["x"] = torch.nn.functional.pad(x.flatten(1), (0, 1))[:, :-1].unflatten(1, x.shape[1:])
    elif what == "expanded":
        arguments["x"] = x[:, :1].expand(6, 8, 5, 3)
    elif what == "gradient expanded":
        dy = dy[:1, :1].expand(6, 8, 5, 3)
    else:
        arguments, dy = call(device, (6, 6, 5, 3), torch.float32, False), dy[:, :6].contiguous()
    assert_same(run(kernels, arguments, dy), run(reference, arguments, dy))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_huge_mean_costs_planes_side_by_side_no_more_digits(device, dtype):
    arguments = call(device, (40, 8, 7, 7), dtype, False)
    arguments["x"] = arguments["x"] + (300.0 if dtype == torch.bfloat16 else 1e4)
    ours, wide = run(kernels, arguments)["saved"], arguments["x"].double()
    assert torch.allclose(ours[0].double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    inv_std = (wide.var((0, 2, 3), correction=0) + 1e-5).rsqrt()
    assert torch.allclose(ours[1].double(), inv_std, rtol=2e-5, atol=0)


def test_infinity_stays_in_its_channel_of_planes_side_by_side(device):
    arguments = call(device, (6, 8, 5, 3), torch.float32, False)
    arguments["x"][2, 3, 1, 1], arguments["x"][1, 4, 0, 0], arguments["x"][1, 7, 0, 2] = (
        torch.inf,
        torch.nan,
        -torch.inf,
    )
    ours, truth = run(kernels, arguments), run(reference, arguments)
    for name in ("y", "dx", "running_mean", "running_var"):
        assert torch.equal(ours[name].isfinite(), truth[name].isfinite()), name
        both = truth[name].isfinite()
        assert torch.allclose(ours[name][both], truth[name][both], rtol=1e-4, atol=1e-4), name
    assert torch.equal(ours["clipped"], truth["clipped"])
