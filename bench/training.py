"""Whole networks: time of a training step and peak memory, with BatchNorm and with our layers in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brn_kernels as brn

from .cases import DTYPES
from .layers import described
from .networks import NETWORKS
from .peers import OURS
from .saved_bytes import SavedBytes
from .timing import captured, peak_bytes, time_together

BATCHNORM = "BatchNorm"
MODES = ("eager", "compiled", "graph")


@dataclass(frozen=True)
class Training:
    """A network trained in a format and a mode; ``batch`` and ``sample`` instead of the network's own, if given."""

    net: str
    dtype: str
    layout: str
    mode: str
    batch: int | None = None
    sample: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        network = NETWORKS[self.net]
        return (self.batch or network.batch, *(self.sample or network.sample))

    def __str__(self) -> str:
        return f"training of {self.net}, {' x '.join(map(str, self.shape))}, {self.dtype} {self.layout}, {self.mode}"


def _with_our_layers(model: nn.Module) -> nn.Module:
    return brn.convert_batchnorm(model, schedule=brn.ClipSchedule.constant(3, 5))


def variants() -> dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], Any]]]:
    """How each candidate changes the model, and what its step runs in."""
    found: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], Any]]] = {
        BATCHNORM: (lambda model: model, contextlib.nullcontext),
        OURS: (_with_our_layers, contextlib.nullcontext),
    }
    if hasattr(brn, "fuse"):
        found[f"{OURS}, fused"] = (lambda model: brn.fuse(_with_our_layers(model)), contextlib.nullcontext)
        if hasattr(brn, "recompute_activations"):
            found[f"{OURS}, fused, recomputing"] = (found[f"{OURS}, fused"][0], brn.recompute_activations)
    return found


def measure(case: Training, device: torch.device, *, seconds: float) -> list[dict[str, Any]]:
    """A row for each candidate; ``seconds`` for each."""
    calls, rows, first = {}, [], None
    torch._dynamo.reset()
    for name, (change, around) in variants().items():
        try:
            step = TrainingStep(case, device, change, around)
            loss = step().item()
            first = loss if first is None else first
            if not abs(loss - first) <= 0.1 * abs(first):  # the same weights and batch, nearly the same statistics
                raise ArithmeticError(f"loss {loss:.4g}, with {BATCHNORM} {first:.4g}")
            calls[name] = step
        except Exception as error:
            rows.append(_row(case, name, error=described(error)))
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    kept = {} if case.mode == "compiled" else {name: call.kept_bytes() for name, call in calls.items()}
    times = {}
    if case.mode != "graph":
        times = time_together(calls, device, seconds * len(calls), host_counts=True) if calls else {}
    for name in calls if case.mode == "graph" else ():  # one after the other: each graph keeps its own memory
        try:
            replay = captured(lambda name=name: calls[name])
            times |= time_together({name: replay}, device, seconds, host_counts=True)
            del replay
        except Exception as error:
            torch.cuda.synchronize()
            rows.append(_row(case, name, error=described(error)))
    for name, time in times.items():
        row = _row(case, name) | {"p20_us": time.p20, "p50_us": time.p50, "p80_us": time.p80}
        row |= {"images_per_s": 1e6 * case.shape[0] / time.p50, "peak_mb": peaks[name] / 1e6}
        if name in kept:
            row["kept_mb"] = kept[name] / 1e6
        if OURS in times:
            row["ratio"] = time.p50 / times[OURS].p50
        rows.append(row)
    return rows


class TrainingStep:
    """One step of SGD on one batch of noise, as a call that returns the loss.

    Args:
        case: what is trained, and how.
        device: where.
        change: makes the candidate of the network.
        around: makes the context of its forward.
    """

    def __init__(
        self,
        case: Training,
        device: torch.device,
        change: Callable[[nn.Module], nn.Module],
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        torch.manual_seed(0)
        last = {2: torch.channels_last, 3: torch.channels_last_3d}[len(case.shape) - 2]
        memory_format = last if case.layout == "channels_last" else torch.contiguous_format
        self.model = change(NETWORKS[case.net].build()).to(device).to(memory_format=memory_format)
        self.x = torch.randn(case.shape, device=device).contiguous(memory_format=memory_format)
        half = case.dtype != "float32"
        self.autocast = torch.autocast(device.type, DTYPES[case.dtype]) if half else contextlib.nullcontext()
        self.around = around
        brn.update_stats(self.model, [self.x])  # at the data's, so that nothing clips
        with torch.no_grad(), self.autocast:
            shape = self.model(self.x[:2]).shape
        self.target = torch.randint(0, shape[1], (case.shape[0], *shape[2:]), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.forward = torch.compile(self.model, dynamic=False) if case.mode == "compiled" else self.model

    def loss(self) -> Tensor:
        """The forward."""
        with self.around(), self.autocast:
            return F.cross_entropy(self.forward(self.x), self.target)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def kept_bytes(self) -> int:
        """What the forward keeps for the backward, parameters and buffers left out."""
        with SavedBytes(self.model) as kept:
            loss = self.loss()
        kept_now = kept.bytes
        del loss
        return kept_now


def _row(case: Training, candidate: str, error: str = "") -> dict[str, Any]:
    return {
        "part": "network", "net": case.net, "batch": case.shape[0], "size": "x".join(map(str, case.shape[1:])),
        "dtype": case.dtype, "layout": case.layout, "state": "open", "direction": "training", "mode": case.mode,
        "candidate": candidate, "error": error,
    }  # fmt: skip


def trainings(
    nets: Sequence[str], formats: Sequence[tuple[str, str]], modes: Sequence[str], **other: Any
) -> list[Training]:
    """All combinations, mode by mode: the quickest to prepare first."""
    return [Training(net, *form, mode, **other) for mode in modes for net in nets for form in formats]
