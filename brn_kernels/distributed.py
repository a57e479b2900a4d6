"""Statistics of the batch of all processes of a group: forward and backward around any backend.

Forward: each process computes the count, the mean and the sum of squares about it (M2) of its own values; one
all_gather brings them to every process, which merges them in the order of ranks by Chan's formula: all get the same
bits. Backward: one all_reduce sums S1, S2 and the count. Nothing synchronizes with the host. The gradients of weight
and bias are those of the local values, as ``nn.SyncBatchNorm``'s are: DistributedDataParallel averages them.

Both directions then apply ``(x - pivot) * scale + shift`` in one pass, which is what a backend's forward does of itself
where nothing is clipped: the fused kernels serve without knowing of processes.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import reference

DEFAULT_GROUP = "default"  # the name, in a layer, of the default group of the process that runs it


def name_of(group: Any) -> str | None:
    """What a layer keeps of a process group: its name, which can be copied, pickled and compiled.

    Raises:
        ValueError: it is no process group, or this process is not a member of it.
    """
    if group is None or isinstance(group, str):
        return group
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"process_group must be a torch.distributed.ProcessGroup of this process, got {group!r}")
    return DEFAULT_GROUP if group is dist.group.WORLD else group.group_name


def group_of(name: str | None) -> dist.ProcessGroup | None:
    """The group of that name if it has several processes; None if there is nothing to exchange.

    Raises:
        RuntimeError: this process has no group of that name.
    """
    if name is None or not dist.is_available() or not dist.is_initialized():
        return None
    if name == DEFAULT_GROUP:
        group = dist.group.WORLD
    else:
        try:
            group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
        except (RuntimeError, KeyError) as error:
            raise RuntimeError(
                f"process_group: this process has no group named {name!r}; give the layers a group of this run with "
                "brn_kernels.convert_sync(model, process_group)"
            ) from error
    return None if group is None or group.size() == 1 else group


def forward(
    backend: ModuleType,
    group: dist.ProcessGroup,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    clipped: Tensor | None,
    limits: Tensor | None,
    schedule: list[float],
    momentum: float | None,
    eps: float,
    activation: str | None,
    coefficients: Tensor | None = None,
    auto_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``reference.forward`` with the statistics of all processes; local batches may differ in size, or be empty."""
    batch_mean, batch_var, m = _statistics(group, x, mask)
    saved, is_clipped = reference.corrected(
        batch_mean, batch_var, running_mean, running_var, num_batches_tracked, limits, schedule, eps, auto_state
    )
    if x.numel() == 0:
        y, bits = torch.empty_like(x), None
    elif mask is not None or not _fuses(backend, x, residual, activation):
        y = torch.empty_like(x)
        bits = reference.write(y, x, residual, mask, weight, bias, saved, activation)
    elif residual is None:
        given = torch.stack([batch_mean, *_scale_and_shift(weight, bias, saved)], out=coefficients)
        y, bits = backend.apply(x, given, activation), None
    else:
        y, bits = _affine(backend, x, residual, batch_mean, *_scale_and_shift(weight, bias, saved), activation)
    reference.update(
        batch_mean, batch_var, m, is_clipped, running_mean, running_var, num_batches_tracked, clipped, momentum, eps,
        auto_state,
    )  # fmt: skip
    return y, saved, bits


def backward(
    backend: ModuleType,
    group: dist.ProcessGroup,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    bits: Tensor | None,
    activation: str | None,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """``reference.backward`` with dx of all processes' sums; dweight and dbias are of the local values."""
    batch_mean, inv_std, r, d = saved.unbind()
    fused = mask is None and _fuses(backend, x, residual, activation)
    if fused:  # with r and d moved into weight and bias, its dweight is S2; its dx is of the local sums
        scale, shift = _scale_and_shift(weight, bias, saved)
        plain = torch.stack([batch_mean, inv_std, torch.ones_like(r), torch.zeros_like(d)])
        dx, S2, S1, dresidual = backend.backward(
            dy, x, residual, None, scale / inv_std, shift, plain, bits, activation, needs_dx, needs_dresidual
        )
    else:
        g, x_bn = reference.upstream(dy, x, residual, mask, weight, bias, saved, bits, activation)
        S1, S2 = g.sum(reference.reduced_dims(x)), (g * x_bn).sum(reference.reduced_dims(x))
        dx = None
        dresidual = torch.empty_like(x).copy_(g) if needs_dresidual else None

    if needs_dx:
        count = _count(x, mask)
        sums = torch.cat([S1.double(), S2.double(), count.view(1)])
        dist.all_reduce(sums, group=group)
        m = sums[-1].clamp(min=1)
        mean_S1, mean_S2 = (sums[:-1] / m).to(saved.dtype).view(2, -1).unbind()
        if fused:  # from the local sums' dx to that of all: one more pass
            of_x = scale * inv_std * (S2 / count - mean_S2).to(saved.dtype)
            dx, _ = _affine(backend, x, dx, batch_mean, of_x, scale * (S1 / count - mean_S1).to(saved.dtype), None)
        else:
            dx = torch.empty_like(x).copy_(reference.gradient_of_x(g, x_bn, mask, weight, saved, mean_S1, mean_S2))
    return dx, r * S2 + d * S1, S1, dresidual


def _statistics(group: dist.ProcessGroup, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """mu_B, the biased var_B and the number of values per channel (0-d), of all processes."""
    dtype = reference.statistics_dtype(x)
    channels = x.shape[1]
    if x.numel() == 0:
        local = torch.zeros(2, channels, dtype=torch.float64, device=x.device)
        count = local.new_zeros(())
    else:
        mean, var, _ = reference.batch_statistics(x, mask)
        count = _count(x, mask)
        local = torch.stack([mean.double(), var.double() * count])
    gathered = torch.empty(group.size() * (2 * channels + 1), dtype=torch.float64, device=x.device)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    all_gather(gathered, torch.cat([count.view(1), local.flatten()]), group=group)

    counts, means, m2s = gathered.view(group.size(), -1).split([1, channels, channels], dim=1)
    m = counts.sum()
    at_least_one = m.clamp(min=1)
    mean = (counts * means).sum(0) / at_least_one
    var = (m2s.sum(0) + (counts * (means - mean).square()).sum(0)) / at_least_one
    return mean.to(dtype), var.to(dtype), m


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    """The local number of values per channel, 0-d float64."""
    if mask is not None:
        return mask.sum().double()
    return torch.full((), x.numel() // max(x.shape[1], 1), dtype=torch.float64, device=x.device)


def _scale_and_shift(weight: Tensor | None, bias: Tensor | None, saved: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = activation((x - batch_mean) * scale + shift + residual)."""
    _, inv_std, r, d = saved.unbind()
    gamma = torch.ones_like(r) if weight is None else weight.to(saved.dtype)
    shift = gamma * d
    return gamma * r * inv_std, shift if bias is None else shift + bias.to(saved.dtype)


def _fuses(backend: ModuleType, x: Tensor, residual: Tensor | None, activation: str | None) -> bool:
    return backend is not reference and backend.is_fused(x, residual, None, activation)


def _affine(
    backend: ModuleType,
    x: Tensor,
    residual: Tensor | None,
    pivot: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str | None,
) -> tuple[Tensor, Tensor | None]:
    """activation((x - pivot) * scale + shift + residual), and the ``bits`` of its ReLU, in one pass.

    By a backend's forward, as an unclipped channel: pivot is its running mean, 1 its running variance.
    """
    open_limits = torch.full((2,), math.inf, dtype=pivot.dtype, device=x.device)
    y, _, bits = backend.forward(
        x, residual, None, scale, shift, pivot.clone(), torch.ones_like(pivot), None, None, open_limits,
        [1.0, 0.0, 0.0, 0.0, 0.0], 0.0, 0.0, activation,
    )  # fmt: skip
    return y, bits
