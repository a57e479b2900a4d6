"""One case: check all candidates against float64, then time them in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cases import DTYPES, HOST, Case
from .peers import OPEN, OURS, Peer, candidates, clipped_channels
from .timing import Times, captured, host_times, peak_bytes, time_together

GRAPHED_BELOW = 2**22  # bytes of an input whose kernels take less time than their launches
COPY = "clone"
TOLERANCE = 0.02  # of the largest value: bfloat16 with several roundings stays below, a wrong formula does not
NEAR_KINK = 0.1


class WrongResults(Exception):
    """Our results are not those of the formula: nothing about us may be published then."""


@dataclass
class Tensors:
    """What a case works on."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Tensors:
        """Normal values; x and the residual want gradients."""

        def normal(shape: Sequence[int]) -> Tensor:
            last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
            values = torch.empty(
                tuple(shape), device=device, dtype=DTYPES[case.dtype],
                memory_format=last if case.layout == "channels_last" else torch.contiguous_format,
            )  # fmt: skip
            return values.normal_()

        shape = case.layer.shape
        x, dy = normal(shape).requires_grad_(), normal(shape)
        return cls(x, normal(shape).requires_grad_() if case.layer.adds else None, dy)

    def run(self, model: nn.Module) -> Tensor:
        return model(self.x) if self.residual is None else model(self.x, self.residual)


@dataclass
class Truth:
    """y and dx of a few channels in float64, from the inputs as they are in their dtype."""

    channels: list[int]
    y: Tensor
    dx: Tensor
    smooth: Tensor  # where the activation has no kink so near that rounding decides on its side

    @classmethod
    def of(cls, case: Case, tensors: Tensors, ours: Peer | None) -> Truth:
        """With r and d of our layer's statistics and limits, or without."""
        some = sorted({0, case.layer.channels // 2, case.layer.channels - 1, *clipped_channels(case)[-1:]})
        x = tensors.x.detach()[:, some].double().requires_grad_()
        var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
        eps, r, d = 1e-5, torch.ones_like(mean), torch.zeros_like(mean)
        if ours is not None:
            norm = ours.norm
            running_std = (norm.running_var[some].double() + eps).sqrt()
            r_max, d_max = norm.schedule.r_max, norm.schedule.d_max
            r = ((var + eps).sqrt() / running_std).clamp(1 / r_max, r_max).detach()
            d = ((mean - norm.running_mean[some].double()) / running_std).clamp(-d_max, d_max).detach()

        def wide(values: Tensor) -> Tensor:
            return values.view(-1, *(1,) * len(case.layer.size))

        y = (x - wide(mean)) / wide((var + eps).sqrt()) * wide(r) + wide(d)
        if tensors.residual is not None:
            y = y + tensors.residual.detach()[:, some].double()
        kinks = {"relu": (0.0,), "hardswish": (-3.0, 3.0)}.get(case.layer.activation or "", ())
        smooth = torch.ones_like(y, dtype=torch.bool)
        for kink in kinks:
            smooth &= (y - kink).abs() > NEAR_KINK
        if case.layer.activation is not None:
            y = getattr(torch.nn.functional, case.layer.activation)(y)
        (dx,) = torch.autograd.grad(y, x, tensors.dy[:, some].double())
        return cls(some, y.detach(), dx, smooth)

    def fault(self, tensors: Tensors, model: nn.Module) -> str | None:
        """What is wrong with a model's y or dx; None if nothing is."""
        y = tensors.run(model)
        (dx,) = torch.autograd.grad(y, tensors.x, tensors.dy)
        for name, found, truth in (("y", y, self.y), ("dx", dx, self.dx)):
            far = (found.detach()[:, self.channels].double() - truth).abs() > TOLERANCE * truth.abs().max()
            wrong = int((far & self.smooth).sum())
            if wrong or not found.isfinite().all():
                return f"wrong {name}: {wrong} of {far.numel()} values are off by more than 2 % of the largest"
        return None


def prepare(
    case: Case, device: torch.device, compile_peers: bool = True
) -> tuple[Tensors, dict[str, Peer], list[dict[str, Any]]]:
    """Tensors, the candidates whose results are right, ours first, and a row for every other one with its error.

    Raises:
        WrongResults: ours disagrees with float64.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()  # else it gives up after 8 layers that share their code
    tensors = Tensors.random(case, device)
    made, left = candidates(case, tensors.x, compile_peers)
    faults = [_row(case, "", name, error=reason) for name, reason in left.items()]
    ours = made[OURS]()
    truths = {renorm: Truth.of(case, tensors, ours if renorm else None) for renorm in (True, False)}
    models: dict[str, Peer] = {}
    for name, make in made.items():
        try:
            model = make().to(device)
            truth = Truth.of(case, tensors, model) if name == OPEN else truths[model.renorm]
            with model.around():
                fault = truth.fault(tensors, model)
        except Exception as error:  # a peer's failure is a result about it, and no reason to lose the others'
            if name == OURS:
                raise
            fault = described(error)
        if fault is None:
            models[name] = model
        elif name == OURS:
            raise WrongResults(f"{case}: {fault}")
        else:
            faults.append(_row(case, "", name, error=fault))
    return tensors, models, faults


def measure(
    case: Case, device: torch.device, *, directions: Sequence[str], seconds: float, compile_peers: bool = True
) -> list[dict[str, Any]]:
    """All rows of a case: for each candidate and direction the times, what follows from them, or the error.

    Args:
        case: what is measured.
        device: where.
        directions: of ``DIRECTIONS``.
        seconds: for each candidate and direction.
        compile_peers: whether to measure ``torch.compile`` of the peers too, which takes some seconds for each.

    Raises:
        WrongResults: ours disagrees with float64.
    """
    tensors, models, rows = prepare(case, device, compile_peers)
    for direction in directions:
        calls = {name: in_direction(model, tensors, direction) for name, model in models.items()}
        if case.layer.net == HOST:
            rows += rows_of(case, direction, "host", host_times(calls, device), {})
            continue
        peaks = {name: peak_bytes(call, device) for name, call in calls.items()} if direction == "both" else {}
        calls[COPY] = tensors.x.detach().clone
        duration = seconds * len(calls)
        rows += rows_of(case, direction, "eager", time_together(calls, device, duration), peaks)
        if device.type == "cuda" and case.bytes < GRAPHED_BELOW:
            rows += _graphed(case, direction, models, tensors, duration)
    return rows


def in_direction(model: Peer, tensors: Tensors, direction: str) -> Callable[[], Any]:
    """The call that is timed."""
    inputs = [tensors.x, *([] if tensors.residual is None else [tensors.residual]), *model.parameters()]
    if direction == "forward":

        def call() -> Any:
            return tensors.run(model)
    elif direction == "both":

        def call() -> Any:
            return torch.autograd.grad(tensors.run(model), inputs, tensors.dy)
    else:
        with model.around():
            y = tensors.run(model)

        def call() -> Any:
            return torch.autograd.grad(y, inputs, tensors.dy, retain_graph=True)

    if model.around is contextlib.nullcontext:
        return call

    def surrounded() -> Any:
        with model.around():
            return call()

    return surrounded


def _graphed(
    case: Case, direction: str, models: dict[str, Peer], tensors: Tensors, seconds: float
) -> list[dict[str, Any]]:
    rows, graphs = [], {}
    for name, model in models.items():
        try:
            graphs[name] = captured(lambda model=model: in_direction(model, tensors, direction))
        except Exception as error:
            torch.cuda.synchronize()
            rows.append(_row(case, direction, name, mode="graph", error=described(error)))
    graphs[COPY] = captured(lambda: tensors.x.detach().clone)
    return rows + rows_of(case, direction, "graph", time_together(graphs, tensors.x.device, seconds), {})


def described(error: Exception) -> str:
    """An error in a cell of a table."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def rows_of(
    case: Case, direction: str, mode: str, times: dict[str, Times], peaks: dict[str, int]
) -> list[dict[str, Any]]:
    """What the times of one direction say."""
    rows = []
    for name, time in times.items():
        necessary = 2 * case.bytes if name == COPY else case.necessary_bytes(direction)
        row = _row(case, direction, name, mode=mode)
        row |= {"p20_us": time.p20, "p50_us": time.p50, "p80_us": time.p80}
        if OURS in times:
            row["ratio"] = time.p50 / times[OURS].p50
        if COPY in times:
            row["gb_per_s"] = necessary / time.p50 / 1e3
            row["percent_of_copy"] = 100 * times[COPY].p50 * necessary / (2 * case.bytes) / time.p50
        if name in peaks:
            row["peak_mb"] = peaks[name] / 1e6
        rows.append(row)
    return rows


def _row(case: Case, direction: str, candidate: str, *, mode: str = "", error: str = "") -> dict[str, Any]:
    layer = case.layer
    return {
        "part": "layer", "net": layer.net, "batch": layer.batch, "channels": layer.channels,
        "size": "x".join(map(str, layer.size)), "follows": layer.follows, "count": layer.count, "mb": case.bytes / 1e6,
        "dtype": case.dtype, "layout": case.layout, "state": case.state, "direction": direction, "mode": mode,
        "candidate": candidate, "error": error,
    }  # fmt: skip
