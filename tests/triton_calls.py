"""Calls of the Triton kernels beside the reference, for the tests of both."""

import pytest
import torch
from tolerances import assert_close

from brn_kernels.backends import reference

CLOSED = [1.0, 0.0, 0.0, 0.0, 0.0]
NARROW = [1.2, 0.2, 0.0, 0.0, 0.0]  # clips some channels of random data
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])


def call(device, shape=(6, 11, 5, 3), dtype=torch.float64, channels_last=True, residual=False, activation=None, **more):
    """Arguments of ``forward`` by name; ``more`` replaces some."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    per_channel = [1, -1] + [1] * (len(shape) - 2)
    x = normal(*shape) * (0.5 + torch.rand(channels, generator=generator).double()).view(per_channel)
    x = (x + normal(channels).mul(0.3).view(per_channel)).to(device, dtype)
    extra = normal(*shape).to(device, dtype) if residual else None
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        extra = None if extra is None else extra.movedim(1, -1).contiguous().movedim(-1, 1)
    acc = reference.statistics_dtype(x)
    return {
        "x": x, "residual": extra, "mask": None,
        "weight": (1 + 0.3 * normal(channels)).to(device, acc), "bias": normal(channels).to(device, acc),
        "running_mean": torch.zeros(channels, dtype=acc, device=device),
        "running_var": torch.ones(channels, dtype=acc, device=device),
        "num_batches_tracked": torch.tensor(5, device=device),
        "clipped": torch.zeros(channels, dtype=torch.bool, device=device),
        "limits": None, "schedule": NARROW, "momentum": 0.1, "eps": 1e-5, "activation": activation,
    } | more  # fmt: skip


def copied(value):
    """A copy with the same strides, and as far from where its allocation begins: ``clone`` would align it."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage().clone()
    copy = torch.empty(0, dtype=value.dtype, device=value.device)
    copy.set_(storage, value.storage_offset(), value.shape, value.stride())
    assert (copy.data_ptr() - value.data_ptr()) % 16 == 0 and copy.data_ptr() != value.data_ptr()
    return copy


def moved(tensor, by):
    """The same values in the same strides, ``by`` elements from where an allocation begins; alone in its memory."""
    if tensor is None:
        return None
    dense = tensor.clone()
    room = torch.empty(dense.numel() + by, dtype=dense.dtype, device=dense.device)
    return room.as_strided(dense.shape, dense.stride(), by).copy_(dense)


def run(backend, arguments, dy=None, bits_moved=0, saved_moved=0, **needs):
    """Everything a forward and backward give and change, by name; the arguments stay as they are, copies too.

    ``bits_moved``, ``saved_moved``: by how many elements, between forward and backward.
    """
    mine = {name: copied(value) for name, value in arguments.items()}
    y, saved, bits = backend.forward(**mine)
    saved, bits = moved(saved, saved_moved), moved(bits, bits_moved)
    if dy is None:
        dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    residual = None if reference.keeps_bits(mine["residual"], mine["activation"]) else mine["residual"]
    gradients = backend.backward(
        dy, mine["x"], residual, mine["mask"], mine["weight"], mine["bias"], saved, bits, mine["activation"],
        needs.get("needs_dx", True), needs.get("needs_dresidual", mine["residual"] is not None),
    )  # fmt: skip
    changed = {name: mine[name] for name in ("running_mean", "running_var", "num_batches_tracked", "clipped")}
    named = dict(zip(("dx", "dweight", "dbias", "dresidual"), gradients, strict=True))
    return {"y": y, "saved": saved, "bits": bits} | changed | named


def assert_same(ours, truth):
    for name, expected in truth.items():
        if expected is None:
            assert ours[name] is None, name
            continue
        assert ours[name].dtype == expected.dtype, name
        if expected.is_floating_point():
            scale = expected.abs().max().item() * 50 if expected.numel() else 1.0
            assert_close(ours[name].cpu(), expected.cpu().double(), name, max(scale, 1.0))
        else:
            assert torch.equal(ours[name], expected), name


def spy(kernel, launches):
    class Spy:
        arg_names = kernel.arg_names

        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    return Spy()


def layout_like(like, values):
    return torch.empty_like(like).copy_(values)
