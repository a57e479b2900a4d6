"""Our layer, and what a user would pick instead: ``candidates`` makes them all for one case.

Every peer normalizes, adds the residual and activates, as the layer's ``follows`` says. Those that are Batch
Renormalization start from our layer's running statistics and limits, and keep them (momentum 0), so that all compute
the same.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brn_kernels as brn

from .cases import ALL_PEERS, Case, Layer

OURS = "brn_kernels"
OPEN = "brn_kernels, nothing clipped"  # beside it in another state
EAGER = "BatchNorm ("  # PyTorch's, and whose kernels it took
_ACTIVATE = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_RENORMS = {1: brn.BatchRenorm1d, 2: brn.BatchRenorm2d, 3: brn.BatchRenorm3d}


class Peer(nn.Module):
    """A normalization in the terms of a case; ``renorm``: whether it corrects by r and d."""

    renorm = False
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # every call, backward included

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y = y + residual
        return y if self.layer.activation is None else _ACTIVATE[self.layer.activation](y)


class BatchNorm(Peer):
    """PyTorch's, by the kernels it chooses itself."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.norm = _NORMS[len(layer.size)](layer.channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.finish(self.norm(x), residual)


class BatchNormWithoutCudnn(BatchNorm):
    """PyTorch's own kernels, where it would have chosen cuDNN's."""

    @staticmethod
    def around() -> AbstractContextManager[Any]:
        return torch.backends.cudnn.flags(enabled=False)


class FlagGemsBatchNorm(BatchNorm):
    """PyTorch's layer over FlagGems' Triton kernels."""

    @staticmethod
    def around() -> AbstractContextManager[Any]:
        return importlib.import_module("flag_gems").use_gems()


class AttorchBatchNorm(Peer):
    """attorch's Triton kernels, which fuse the activation and the residual."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        make = getattr(importlib.import_module("attorch"), f"BatchNorm{len(layer.size)}d")
        self.norm = make(layer.channels, act_func=layer.activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x) if residual is None else self.norm(x, residual)


class _Renorm(Peer):
    """What the peers that are Batch Renormalization share: parameters, statistics, r and d."""

    renorm = True

    def __init__(self, ours: brn.BatchRenorm, layer: Layer) -> None:
        super().__init__(layer)
        self.weight, self.bias = nn.Parameter(torch.ones(layer.channels)), nn.Parameter(torch.zeros(layer.channels))
        self.register_buffer("running_mean", ours.running_mean.clone())
        self.register_buffer("running_var", ours.running_var.clone())
        self.r_max, self.d_max, self.eps, self.momentum = ours.schedule.r_max, ours.schedule.d_max, ours.eps, 0.0
        self.dims = (0, *range(2, 2 + len(layer.size)))

    def r_and_d(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """And the running statistics' update."""
        with torch.no_grad():
            running_std = (self.running_var + self.eps).sqrt()
            r = (std / running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(std.square() - self.eps, self.momentum)
        return r, d

    def per_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * len(self.layer.size))


class TorchBatchRenorm(_Renorm):
    """As one writes it from the paper: PyTorch's operations, differentiated by autograd, in float32."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        dtype, x = x.dtype, x.float()
        var, mean = torch.var_mean(x, self.dims, correction=0)
        std = (var + self.eps).sqrt()
        r, d = self.r_and_d(mean, std)
        scale = self.weight * r / std
        shift = self.weight * d + self.bias - mean * scale
        y = (x * self.per_channel(scale) + self.per_channel(shift)).to(dtype)
        return self.finish(y, residual)


class BatchRenormOverBatchNorm(_Renorm):
    """What public layers do: statistics for r and d, then ``F.batch_norm``, then multiply and add."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            var, mean = torch.var_mean(x.float(), self.dims, correction=0)
            r, d = self.r_and_d(mean, (var + self.eps).sqrt())
        normalized = F.batch_norm(x, None, None, training=True, eps=self.eps)
        scale, shift = self.weight * r, self.weight * d + self.bias
        y = normalized * self.per_channel(scale.to(x.dtype)) + self.per_channel(shift.to(x.dtype))
        return self.finish(y, residual)


class BatchRenormOfSyncOperators(_Renorm):
    """Of the fused operators that ``nn.SyncBatchNorm`` consists of: torch has them on GPUs only."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, inv_std = torch.batch_norm_stats(x.detach(), self.eps)
        r, d = self.r_and_d(mean, 1 / inv_std)
        y = _SyncOperators.apply(x, self.weight, self.bias, mean, inv_std, r, d, self.eps)
        return self.finish(y, residual)


class _SyncOperators(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inv_std: Tensor, r: Tensor, d: Tensor,
                eps: float) -> Tensor:  # fmt: skip
        scale = weight * r
        ctx.save_for_backward(x, scale, mean, inv_std, r, d)
        return torch.batch_norm_elemt(x, scale, bias + weight * d, mean, inv_std, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, inv_std, r, d = ctx.saved_tensors
        channels_last = x.dim() > 3 and not x.is_contiguous()
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
        dy = dy.contiguous(memory_format=last if channels_last else torch.contiguous_format)
        sum_dy, sum_dy_xmu, S2, S1 = torch.batch_norm_backward_reduce(dy, x, mean, inv_std, scale, True, True, True)
        count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
        dx = torch.batch_norm_backward_elemt(dy, x, mean, inv_std, scale, sum_dy, sum_dy_xmu, count)
        return dx, r * S2 + d * S1, S1, None, None, None, None, None


class Ours(Peer):
    """The layer this project is about, with all that it fuses."""

    renorm = True

    def __init__(self, case: Case, x: Tensor) -> None:
        super().__init__(case.layer)
        closed, clip = case.state == "closed", case.state.startswith("clip ")
        schedule = brn.ClipSchedule.batchnorm() if closed else brn.ClipSchedule.constant(3, 5)
        self.norm = _RENORMS[len(case.layer.size)](
            case.layer.channels, momentum=0.0, schedule=schedule, activation=case.layer.activation, device=x.device
        )
        var, mean = torch.var_mean(x.detach().float(), (0, *range(2, x.dim())), correction=0)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(var)
        if clip:
            self.norm.running_mean[clipped_channels(case)] += 20 * var.sqrt().mean()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x, residual)


def clipped_channels(case: Case) -> list[int]:
    """The channels that clip, spread evenly: next to each other they would share the work of their repair."""
    if not case.state.startswith("clip "):
        return list(range(case.layer.channels)) if case.state == "closed" else []
    number = max(1, round(case.layer.channels * int(case.state.removeprefix("clip ")) / 100))
    return [i * case.layer.channels // number for i in range(number)]


def compiled(model: nn.Module) -> nn.Module:
    """The model compiled for its shape."""
    torch._functorch.config.donated_buffer = False  # backwards are timed over and over on one graph
    return torch.compile(model, dynamic=False, fullgraph=True)


def kernels_of_batchnorm(x: Tensor) -> str:
    """Whose kernels PyTorch's eager BatchNorm takes for such an input."""
    statistics = torch.ones(x.shape[1], device=x.device)
    choice = torch._C._select_batch_norm_backend(x, statistics, statistics, statistics, statistics, True, 1e-5)
    return {"Native": "ATen", "Cudnn": "cuDNN", "Miopen": "MIOpen"}[str(choice).rpartition(".")[2]]


def candidates(
    case: Case, x: Tensor, compile_peers: bool = True
) -> tuple[dict[str, Callable[[], Peer]], dict[str, str]]:
    """What takes turns on a case, ours first, as functions that build it; and why others do not."""
    ours, cuda = Ours(case, x), x.device.type == "cuda"
    layer, taken = case.layer, kernels_of_batchnorm(x)
    made: dict[str, Callable[[], Any]] = {OURS: lambda: ours, f"{EAGER}{taken})": lambda: BatchNorm(layer)}
    left: dict[str, str] = {}
    if case.state != "open":
        made[OPEN] = lambda: Ours(replace(case, state="open"), x)
    if case.peers != ALL_PEERS:
        return made, left
    if taken == "cuDNN":
        made[f"{EAGER}ATen)"] = lambda: BatchNormWithoutCudnn(layer)
    if compile_peers:
        made["BatchNorm, compiled"] = lambda: compiled(BatchNorm(layer).to(x.device))
    made["BRN in PyTorch"] = lambda: TorchBatchRenorm(ours.norm, layer)
    if compile_peers:
        made["BRN in PyTorch, compiled"] = lambda: compiled(TorchBatchRenorm(ours.norm, layer).to(x.device))
    made["BRN over F.batch_norm"] = lambda: BatchRenormOverBatchNorm(ours.norm, layer)
    for name, make, package, usable in (
        ("BRN of SyncBatchNorm's operators", lambda: BatchRenormOfSyncOperators(ours.norm, layer), None, cuda),
        ("FlagGems", lambda: FlagGemsBatchNorm(layer), "flag_gems", cuda),
        ("attorch", lambda: AttorchBatchNorm(layer), "attorch", cuda and len(layer.size) < 3),
    ):
        if not usable:
            left[name] = "GPUs only" if not cuda else "not for such layers"
        elif package and importlib.util.find_spec(package) is None:
            left[name] = f"{package} is not installed"
        else:
            made[name] = make
    return made, left
