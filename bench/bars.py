"""The speeds the Triton kernels must reach, measured in one run: ``python -m bench.bars``.

Every number is a ratio against something measured in the same run: a copy of the same bytes, or what a user would pick
instead. L2 is flushed before each call. Limits are open and nothing clips, unless a row says otherwise. Results are
checked against float64 before anything is timed. Writes a table, and a CSV with device, versions, commit and date.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from triton.testing import do_bench

import brn_kernels as brn
from bench.cases import RESNET50
from bench.peers import BatchNorm, compiled
from bench.record import write_csv

BATCH = 256
FORMATS = {
    "bf16 channels_last": (torch.bfloat16, torch.channels_last),
    "fp32 contiguous": (torch.float32, torch.contiguous_format),
}
# (what, format) -> bound; "at most" for times, "at least" for speed-ups
BARS = {
    ("forward / clone, >= 200 MB", "bf16 channels_last"): ("at most", 1.15),
    ("forward / clone, >= 200 MB", "fp32 contiguous"): ("at most", 1.15),
    ("backward / 5 passes, >= 200 MB", "bf16 channels_last"): ("at most", 1.15),
    ("backward / 5 passes, >= 200 MB", "fp32 contiguous"): ("at most", 1.15),
    ("ResNet-50, eager BatchNorm / ours", "bf16 channels_last"): ("at least", 2.5),
    ("ResNet-50, eager BatchNorm / ours", "fp32 contiguous"): ("at least", 1.5),
    ("ResNet-50, compiled BatchNorm / ours", "bf16 channels_last"): ("at least", 1.3),
    ("ResNet-50, compiled BatchNorm / ours", "fp32 contiguous"): ("at least", 1.3),
}


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU, L2 flushed."""
    return do_bench(call, warmup=10, rep=60, quantiles=[0.5])


def tensors(channels: int, size: int, what: str, form: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, residual or None, and dy of a layer."""
    dtype, memory_format = FORMATS[form]

    def normal() -> Tensor:
        values = torch.randn(BATCH, channels, size, size, device="cuda", dtype=dtype)
        return values.to(memory_format=memory_format)

    return normal().requires_grad_(), normal().requires_grad_() if what == "add" else None, normal()


def settled(channels: int, what: str, x: Tensor, residual: Tensor | None) -> brn.BatchRenorm2d:
    """Our layer, its running statistics near the data's, so that nothing clips."""
    layer = brn.BatchRenorm2d(
        channels, schedule=brn.ClipSchedule.constant(3, 5), activation=None if what == "plain" else "relu"
    ).cuda()
    layer.running_mean.normal_(0, 0.05)
    for _ in range(3):
        layer(x, residual)
    assert not layer.clipped.any()
    return layer


def check(layer: brn.BatchRenorm2d, x: Tensor, residual: Tensor | None, dy: Tensor) -> None:
    """Refuse to time wrong results: a few channels against float64."""
    some = slice(0, 4)
    mean, var = layer.running_mean[some].double(), layer.running_var[some].double()
    scale = (layer.weight[some].double() / (var + layer.eps).sqrt())[:, None, None]
    z = (x[:, some].double() - mean[:, None, None]) * scale + layer.bias[some].double()[:, None, None]
    z = z if residual is None else z + residual[:, some].double()
    expected = z.relu() if layer.activation else z
    y = layer(x, residual)
    error = (y[:, some].double() - expected).abs().max().item()
    if not error <= 0.05 * expected.abs().max().item():
        raise AssertionError(f"wrong results, not timed: error {error:.3g}")
    (dx,) = torch.autograd.grad(y, x, dy)
    if not dx.double().mean((0, 2, 3)).abs().max() < 1e-3:
        raise AssertionError("wrong gradients, not timed: the sum of dx is not zero")


def both_directions(model: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> float:
    """Time of a forward and a backward."""
    inputs = [x, *([residual] if residual is not None else []), *model.parameters()]
    return milliseconds(
        lambda: torch.autograd.grad(model(x, residual) if residual is not None else model(x), inputs, dy)
    )


def large(form: str) -> list[tuple[str, float]]:
    """Forward against a clone, backward against 5 passes at copy speed, of layers of 200 MB and more."""
    forwards, backwards = [], []
    for channels, size in ((64, 112), (256, 56), (512, 28)):
        x, _, dy = tensors(channels, size, "plain", form)
        layer = settled(channels, "plain", x, None)
        check(layer, x, None, dy)
        copy = milliseconds(x.detach().clone)
        with torch.no_grad():
            forwards.append(milliseconds(lambda layer=layer, x=x: layer(x)) / copy)
        y = layer(x)
        inputs = [x, *layer.parameters()]
        backward = milliseconds(lambda y=y, i=inputs, dy=dy: torch.autograd.grad(y, i, dy, retain_graph=True))
        backwards.append(backward / (2.5 * copy))  # a copy is two passes
    return [("forward / clone, >= 200 MB", max(forwards)), ("backward / 5 passes, >= 200 MB", max(backwards))]


def resnet50(form: str, quick: bool) -> list[tuple[str, float]]:
    """Geometric means over all layers of ResNet-50, forward and backward together."""
    logs: dict[str, list[float]] = {"eager": [], "compiled": []}
    for channels, size, what, count in tqdm(RESNET50[::4] if quick else RESNET50, desc=form, unit="layer"):
        x, residual, dy = tensors(channels, size, what, form)
        layer = settled(channels, what, x, residual)
        check(layer, x, residual, dy)
        ours = both_directions(layer, x, residual, dy)
        eager = BatchNorm(channels, what).cuda()
        fused = compiled(BatchNorm(channels, what).cuda())
        for name, peer in (("eager", eager), ("compiled", fused)):
            logs[name] += [math.log(both_directions(peer, x, residual, dy) / ours)] * count
    return [
        (f"ResNet-50, {name} BatchNorm / ours", math.exp(statistics.fmean(values))) for name, values in logs.items()
    ]


def host_microseconds() -> list[tuple[str, float]]:
    """Host time of a call on a small layer, not waiting for the GPU."""
    x = torch.randn(32, 64, 7, 7, device="cuda", requires_grad=True)
    rows = []
    for name, layer in (("ours", brn.BatchRenorm2d(64).cuda()), ("nn.BatchNorm2d", nn.BatchNorm2d(64).cuda())):
        for _ in range(20):
            layer(x).backward(x.detach())
        torch.cuda.synchronize()
        times = []
        for _ in range(200):
            start = time.perf_counter()
            y = layer(x)
            middle = time.perf_counter()
            y.backward(x.detach())
            times.append((1e6 * (middle - start), 1e6 * (time.perf_counter() - middle)))
            torch.cuda.synchronize()
        forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
        rows += [(f"host time forward, {name}, us", forward), (f"host time backward, {name}, us", backward)]
    return rows


def main() -> int:
    """Measure, print, write; return 1 if a bar is missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of ResNet-50's layers")
    parser.add_argument("--out", default="bench/results/bars.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.bars needs an NVIDIA GPU: nothing was measured", file=sys.stderr)
        return 2
    brn.use_backend("triton")
    rows, missed = [], 0
    for form in FORMATS:
        for what, value in large(form) + resnet50(form, arguments.quick):
            direction, bound = BARS[what, form]
            met = value <= bound if direction == "at most" else value >= bound
            missed += not met
            rows.append([what, form, f"{value:.3f}", f"{direction} {bound}", "met" if met else "MISSED"])
    rows += [[what, "fp32", f"{value:.1f}", "", ""] for what, value in host_microseconds()]
    print(tabulate(rows, ["what", "format", "measured", "bar", ""], disable_numparse=True))
    columns = ("what", "format", "measured", "bar", "met")
    write_csv(
        arguments.out, [dict(zip(columns, row, strict=True)) | {"triton": triton.__version__} for row in rows], "cuda"
    )
    print(f"\n{arguments.out} written")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
