"""The quick check before and after a change: one layer against its peers, interleaved round by round.

What pytest-benchmark records (and compares with ``--benchmark-compare``) is our time. Each of its rounds first times
every peer once, so that a ratio holds on a noisy machine: all saw the same noise. Limits are open and nothing clips.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import brn_kernels as brn
from bench import peers

ROUNDS = 15
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("activation", [None, "relu"], ids=["plain", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer(benchmark, request, device, layer, layout, dtype, activation, direction):
    channels, size = layer
    shape = (request.config.getoption("--batch"), channels, size, size)
    x = normal(shape, dtype, layout, device).requires_grad_()
    dy = normal(shape, dtype, layout, device)
    models = candidates(channels, activation, x)
    check(models["ours"], x, dy)

    calls = {name: in_direction(model, x, dy, direction) for name, model in models.items()}
    if direction == "forward":
        calls["clone"] = lambda: x.detach().clone()
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}

    order, shuffle = list(calls), random.Random(0).shuffle  # nobody always follows the same one

    def time_all() -> None:
        shuffle(order)
        for name in order:
            times[name].append(seconds(calls[name], device))

    benchmark.pedantic(calls["ours"], setup=time_all, rounds=ROUNDS)
    ours = times.pop("ours")
    ratios = {name: statistics.median(theirs) / statistics.median(ours) for name, theirs in times.items()}
    benchmark.group = f"{direction}, {activation or 'plain'}, {dtype}, {layout}"
    benchmark.extra_info.update(
        name=request.node.name, layer=f"{channels}x{size}x{size}", direction=direction,
        activation=activation or "plain", dtype=dtype, layout=layout, ratios=ratios,
    )  # fmt: skip


def test_forward_of_100_mb_against_clone(benchmark, device):
    """The forward that reads and writes once takes what a copy takes."""
    ratios = {}
    for layout in LAYOUTS:
        x = normal((100, 64, 64, 64), "float32", layout, device)
        ours = settled(64, None, x)
        with torch.no_grad():
            times: dict[str, list[float]] = {"clone": [], "ours": []}
            for _ in range(ROUNDS):
                times["clone"].append(seconds(x.clone, device))
                times["ours"].append(seconds(lambda ours=ours, x=x: ours(x), device))
        ratios[layout] = statistics.median(times["ours"]) / statistics.median(times["clone"])
    benchmark.extra_info["forward / clone"] = ratios
    benchmark.pedantic(x.clone, rounds=ROUNDS)
    print("\nforward / clone, 100 MB of float32:", {layout: round(ratio, 2) for layout, ratio in ratios.items()})


def candidates(channels: int, activation: str | None, x: Tensor) -> dict[str, nn.Module]:
    """Our layer, and what a user would pick instead."""
    what = activation or "plain"
    device = x.device
    return {
        "ours": settled(channels, activation, x),
        "BatchNorm": peers.BatchNorm(channels, what).to(device),
        "compiled BatchNorm": peers.compiled(peers.BatchNorm(channels, what).to(device)),
        "torch BRN": peers.TorchBatchRenorm(channels, what).to(device),
    }


def settled(channels: int, activation: str | None, x: Tensor) -> brn.BatchRenorm2d:
    """Our layer after a few steps, so that nothing clips and its prediction is right."""
    schedule = brn.ClipSchedule.constant(3, 5)
    layer = brn.BatchRenorm2d(channels, schedule=schedule, activation=activation).to(x.device)
    for _ in range(2):
        layer(x)
    assert not layer.clipped.any()
    return layer


def check(layer: brn.BatchRenorm2d, x: Tensor, dy: Tensor) -> None:
    """Refuse to time wrong results: y and dx of a few channels against float64."""
    some = slice(0, 4)
    x64 = x.detach()[:, some].double().requires_grad_()
    mean, var = x64.mean((0, 2, 3)), x64.var((0, 2, 3), correction=0)
    running_std = (layer.running_var[some].double() + layer.eps).sqrt()
    r = ((var + layer.eps).sqrt() / running_std).detach()
    d = ((mean - layer.running_mean[some].double()) / running_std).detach()
    normalized = (x64 - mean[:, None, None]) / (var + layer.eps).sqrt()[:, None, None]
    expected = normalized * r[:, None, None] + d[:, None, None]
    expected = expected.relu() if layer.activation else expected
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    (dx64,) = torch.autograd.grad(expected, x64, dy[:, some].double())
    for ours, truth in ((y[:, some], expected), (dx[:, some], dx64)):
        wrong = ((ours.double() - truth).abs() > 0.02 * truth.abs().max()).double().mean().item()
        assert wrong < 1e-4, "wrong results, not timed"  # a value next to ReLU's kink may fall on its other side


def in_direction(model: nn.Module, x: Tensor, dy: Tensor, direction: str) -> Callable[[], Any]:
    """The call that is timed."""
    inputs = [x, *model.parameters()]
    if direction == "forward":
        return lambda: model(x)
    if direction == "both":
        return lambda: torch.autograd.grad(model(x), inputs, dy)
    y = model(x)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def normal(shape: tuple[int, ...], dtype: str, layout: str, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype=DTYPES[dtype], memory_format=LAYOUTS[layout])


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed
