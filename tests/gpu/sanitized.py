"""What compute-sanitizer watches: every kernel, in calls that take each of its ways. ``sanitized.py BACKEND WAY``.

Each result is compared with the reference's on the CPU, in float64, and memory is NaN before it is written: an element
that nobody writes, or reads too early, shows without a sanitizer too. (initcheck takes partial results, which other
programs of the same launch have written, for uninitialized, if nothing before the launch has written there.)
Without a GPU the same runs interpreted.
"""

import functools
import sys
from dataclasses import dataclass

import torch

import brn_kernels as brn
from brn_kernels.backends import layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 2 if DEVICE.type == "cuda" else 1  # the second knows which channels clipped
WAYS = ("resident", "in large tiles", "two launches", "bundles", "one launch")
NARROW = brn.ClipSchedule.constant(1.05, 0.05)  # clips some channels of random data
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Call:
    """A layer and its input."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    activation: str | None = None
    residual: bool = False
    schedule: brn.ClipSchedule = NARROW
    start: int = 0  # elements between where memory begins and the tensors: 16 bytes do not divide it
    side_by_side: bool = False  # what the plan must say
    narrow: bool = False


CALLS = (
    Call((11, 24, 7, 7), BF16, True, "relu"),
    Call((11, 12, 7, 7), FP32, True, "relu", residual=True),
    Call((10, 16, 7, 7), BF16, False, "relu", side_by_side=True),
    Call((10, 8, 7, 7), FP32, False, side_by_side=True),
    Call((40, 2, 7, 7), FP32, False, "relu", residual=True, narrow=True),  # packed bits: planes one by one
    Call((40, 2, 8, 8), BF16, False, "silu"),
    Call((40, 2, 8, 8), BF16, False, "relu", residual=True, start=1),
    Call((70, 2, 5, 3), FP32, False, "hardswish", narrow=True),
    Call((50, 7, 3, 3), BF16, True, "leaky_relu", narrow=True, start=1),
    Call((60, 12, 3, 3), FP32, True, schedule=brn.ClipSchedule.batchnorm()),
    Call((40, 2, 8, 8), FP32, False, "relu", schedule=brn.ClipSchedule.batchnorm()),
    Call((60, 12, 3, 3), FP32, True, "relu", schedule=brn.ClipSchedule.auto()),
    Call((40, 2, 8, 8), FP32, False, schedule=brn.ClipSchedule.auto(), start=1),
)


def poison_memory():
    """All that ``torch.empty`` and its relatives return is NaN, or 1."""

    def poisoning(make):
        def made(*arguments, **keywords):
            tensor = make(*arguments, **keywords)
            with torch.no_grad():
                return tensor if tensor.is_meta else tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, poisoning(getattr(torch, name)))
    torch.Tensor.new_empty = poisoning(torch.Tensor.new_empty)


def choose(way):
    """Make the Triton kernels' launches go that way, in small tiles: their loops turn more than once."""
    from brn_kernels.backends.triton import config

    if way == "resident":  # as they are chosen
        return
    config._resident = lambda *_: None
    if way == "in large tiles":
        return
    config.SETTINGS.update(dict.fromkeys(config.SETTINGS, config.Settings(4, 1, 2)))  # what warps share is sanitized
    config.MAX_INNER_CHANNELS_LAST, config.MIN_INNER_CONTIGUOUS = 8, 8
    config.ITEMS_WITHOUT_SPLIT = 10**9 if way == "one launch" else 0
    if way == "bundles":
        config.DIRECT_TRIPS = 0
        config.Launch.merge_rows = lambda *_: 2


def set_plan(call, x, way):
    """Pretend to have so few multiprocessors that each program has several items, and check what the launches are."""
    from brn_kernels.backends.triton import config, launch

    kept = call.residual and call.activation == "relu"
    shape = layout.layout_of(x)
    strides = layout.dense_strides(shape)
    planned = (shape, x.itemsize, (strides[0], 0 if shape.channels_last else strides[1]))

    def launches(multiprocessors):
        return [config.launch_for(way, *planned, multiprocessors, has_bits=kept) for way in ("forward", "backward")]

    def fits(it):
        if way == "one launch":
            return it.alone and it.items_per_split > 1
        if way == "bundles":
            return it.splits > it.bundle(4) == 2
        return it.splits > 1 and it.items_per_split > 1

    launch._plan.cache_clear()
    config.launch_for.cache_clear()
    number = 132
    if way not in ("resident", "in large tiles"):
        number = next((n for n in range(1, 200) if all(map(fits, launches(n)))), None)
        assert number, (call, way, launches(1))
        config.multiprocessors_of = lambda _: number
    for it in launches(number):
        assert it.resident == (way == "resident") or call.residual or call.narrow, (call, it)  # not all fit
        if it.resident:
            continue
        assert call.channels_last or (it.tile_channels > 1) == call.side_by_side, (call, it)
        assert (it.vector * x.itemsize < 16) == call.narrow, (call, it)


def laid_out(values, call, device, dtype):
    """The values with the call's layout and start."""
    values = values.to(dtype)
    values = values.to(memory_format=torch.channels_last if call.channels_last else torch.contiguous_format)
    if device.type == "cpu" and dtype == torch.float64:
        return values
    room = torch.zeros(values.numel() + call.start, dtype=dtype, device=device)
    view = room.as_strided(values.shape, values.stride(), call.start)
    view.copy_(values)
    assert call.start == 0 or view.data_ptr() % 16
    return view


def results(call, values, device, dtype, before=lambda x: None):
    """Steps of a layer: all outputs and gradients of the last, and the statistics."""
    generator = torch.Generator().manual_seed(1)
    layer = brn.BatchRenorm2d(call.shape[1], momentum=0.1, schedule=call.schedule, activation=call.activation)
    with torch.no_grad():
        layer.weight.copy_(1 + 0.3 * torch.randn(call.shape[1], generator=generator))
        layer.bias.copy_(torch.randn(call.shape[1], generator=generator))
    layer = layer.to(device)
    layer = layer.double() if dtype == torch.float64 else layer
    x, dy, extra = (laid_out(v, call, device, dtype) for v in values)
    x.requires_grad_()
    extra = extra.requires_grad_() if call.residual else None
    before(x)
    for _ in range(STEPS):
        x.grad = None
        layer.zero_grad()
        y = layer(x) if extra is None else layer(x, extra)
        y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    if call.residual:
        found["dresidual"] = extra.grad
    return found | dict(layer.named_buffers())


def main(backend, way):
    """Run all calls; an AssertionError says which result is wrong."""
    poison_memory()
    if backend == "triton":
        choose(way)
    for call in CALLS:
        generator = torch.Generator().manual_seed(0)
        spread = 1 + 0.2 * torch.randn(call.shape[1], generator=generator)[:, None, None]
        values = [torch.randn(call.shape, generator=generator) for _ in range(3)]
        values[0] = values[0] * spread + 0.1 * spread
        values = [v.to(call.dtype).double() for v in values]
        with brn.use_backend(backend):
            planning = functools.partial(set_plan, call, way=way) if backend == "triton" else lambda x: None
            ours = results(call, values, DEVICE, call.dtype, planning)
        with brn.use_backend("reference"):
            truth = results(call, values, torch.device("cpu"), torch.float64)
        for name, expected in truth.items():
            found = ours[name].cpu()
            if not expected.is_floating_point():
                assert torch.equal(found, expected), (call, name)
                continue
            bound = (2e-2 if found.dtype == BF16 else 1e-4) * max(1.0, expected.abs().max().item())
            error = (found.double() - expected).abs().max().item()
            assert error <= bound, (call, name, error, bound)  # a NaN is not less


if __name__ == "__main__":
    assert sys.argv[2] in WAYS, sys.argv[2]
    main(*sys.argv[1:])
