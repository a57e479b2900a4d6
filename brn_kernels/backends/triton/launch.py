"""From tensors to kernel launches: two for each direction, or one where a program has whole channels to itself."""

from __future__ import annotations

import contextlib
import functools
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import layout, reference, sides
from ..layout import Layout
from ..sides import copy_back, dense, readable, writable
from . import config, kernels_backward, kernels_forward, launcher
from .config import Launch
from .kernels_common import ACTIVATION_CODES, tl
from .tickets import tickets

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}

MAX_COLUMNS = 2**29  # of a row, and channels: columns and the workspace are counted in 32 bits (rows in 64)


def is_fused(x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None) -> bool:
    """Whether the kernels do this call; what they do not is the reference backend's."""
    if x.numel() >= MAX_COLUMNS and max(x.shape[1], math.prod(x.shape[2:])) >= MAX_COLUMNS:
        return False
    return mask is None and x.numel() > 0 and (residual is None or activation in (None, "relu"))


def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.forward`` in two launches, or in one."""
    if not is_fused(x, residual, mask, activation):
        return reference.forward(
            x, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits, schedule,
            momentum, eps, activation,
        )  # fmt: skip
    shape = sides.layout_of(x)
    source, extra = readable(x, shape), readable(residual, shape)
    y = torch.empty_like(x)
    target = writable(y, shape)
    multiprocessors = config.multiprocessors_of(x.device)
    all_strides = source.strides + extra.strides + target.strides
    kept = reference.keeps_bits(residual, activation)
    launch = config.launch_for("forward", shape, x.element_size(), all_strides, multiprocessors, many_registers=kept)

    acc = reference.statistics_dtype(x)
    saved = torch.empty(4, shape.channels, dtype=acc, device=x.device)
    bits = torch.empty(layout.bits_shape(x), dtype=torch.uint8, device=x.device) if kept else reference.empty_bits(x)
    workspace = _workspace(launch, kernels_forward, acc, x.device)
    r_max, d_max, hold, r_ramp, d_ramp = schedule
    weight, bias, limits = dense(weight), dense(bias), dense(limits)
    dense_mean, dense_var, dense_clipped = dense(running_mean), dense(running_var), dense(clipped)
    bits_or_none = bits if kept else None
    strides = _in_vectors(launch.vector, all_strides)
    tile, sums = _tile(launch, acc, activation), _sums(launch, acc)
    integers, hold_and_ramps = (*_geometry(launch, shape), *strides), (int(hold), int(r_ramp), int(d_ramp))
    floats = (r_max, d_max, 0.0 if momentum is None else momentum, eps, float(x.numel() // shape.channels))
    with _on_device(x):
        launcher.launch(
            kernels_forward.stream_kernel, launch.grid,
            (source.tensor, extra.tensor, target.tensor, bits_or_none, weight, bias, dense_mean, dense_var,
             _as_bytes(dense_clipped), num_batches_tracked, limits, saved, workspace,
             tickets(x.device, launch.channel_tiles)),
            integers + hold_and_ramps, floats,
            (*tile, *sums, ("CUMULATIVE", momentum is None), ("ALONE", launch.alone)),
            x.device,
        )  # fmt: skip
        if not launch.alone:
            launcher.launch(
                kernels_forward.repair_kernel, launch.grid,
                (source.tensor, extra.tensor, target.tensor, bits_or_none, num_batches_tracked, workspace),
                integers, (), tile, x.device,
            )  # fmt: skip
    target.copy_to(y)
    copy_back(((dense_mean, running_mean), (dense_var, running_var), (dense_clipped, clipped)))
    if coefficients is not None:
        coefficients.copy_(_coefficients(workspace, launch)[:3, : shape.channels])
    return y, saved, bits


def apply(x: Tensor, coefficients: Tensor, activation: str | None) -> Tensor:
    """Y of the ``coefficients`` that ``forward`` filled: every channel is repaired."""
    shape = sides.layout_of(x)
    source = readable(x, shape)
    y = torch.empty_like(x)
    target = writable(y, shape)
    all_strides = source.strides + (0, 0) + target.strides
    multiprocessors = config.multiprocessors_of(x.device)
    launch = config.launch_for("forward", shape, x.element_size(), all_strides, multiprocessors)
    workspace = torch.ones(
        kernels_forward.COEFFICIENT_ROWS * launch.padded_channels, dtype=coefficients.dtype, device=x.device
    )
    _coefficients(workspace, launch)[:3, : shape.channels] = coefficients
    with _on_device(x):
        launcher.launch(
            kernels_forward.repair_kernel, launch.grid, (source.tensor, None, target.tensor, None, None, workspace),
            (*_geometry(launch, shape), *_in_vectors(launch.vector, all_strides)), (),
            _tile(launch, coefficients.dtype, activation), x.device,
        )  # fmt: skip
    target.copy_to(y)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    bits: Tensor,
    activation: str | None,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``reference.backward`` in two launches, or in one."""
    kept = bits.numel() > 0
    if not is_fused(x, None if kept else residual, mask, activation):
        return reference.backward(
            dy, x, residual, mask, weight, bias, saved, bits, activation, needs_dx, needs_dresidual
        )
    shape = sides.layout_of(x)
    upstream, source = readable(dy, shape), readable(x, shape)
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    dresidual = torch.empty_like(x) if needs_dresidual else x.new_empty(0)
    to_x = writable(dx if needs_dx else None, shape)
    to_residual = writable(dresidual if needs_dresidual else None, shape)
    all_strides = upstream.strides + source.strides + to_x.strides + to_residual.strides
    multiprocessors = config.multiprocessors_of(x.device)
    smooth = activation in ("silu", "hardswish")
    launch = config.launch_for("backward", shape, x.element_size(), all_strides, multiprocessors, many_registers=smooth)

    acc = saved.dtype
    weight, bias, saved, bits = dense(weight), dense(bias), saved.contiguous(), bits.contiguous()
    dweight = torch.empty(shape.channels, dtype=acc, device=x.device)
    dbias = torch.empty(shape.channels, dtype=acc, device=x.device)
    workspace = _workspace(launch, kernels_backward, acc, x.device)
    tensors = (upstream.tensor, source.tensor, bits if kept else None, weight, bias, saved)
    targets = (to_x.tensor, to_residual.tensor)
    geometry = _geometry(launch, shape)
    strides = _in_vectors(launch.vector, all_strides)
    values = (float(x.numel() // shape.channels),)
    tile, sums = _tile(launch, acc, activation), _sums(launch, acc)
    with _on_device(x):
        if launch.alone and (needs_dx or needs_dresidual):
            launcher.launch(
                kernels_backward.alone_kernel, launch.grid, (*tensors, dweight, dbias, *targets, workspace),
                (*geometry, *strides), values, tile + sums, x.device,
            )  # fmt: skip
        else:
            launcher.launch(
                kernels_backward.reduce_kernel, launch.grid,
                (*tensors, dweight, dbias, workspace, tickets(x.device, launch.channel_tiles)),
                (*geometry, *strides[:4]), values, tile + sums, x.device,
            )  # fmt: skip
            if needs_dx or needs_dresidual:
                launcher.launch(
                    kernels_backward.apply_kernel, launch.grid, (*tensors, *targets, workspace),
                    (*geometry, *strides), (), tile, x.device,
                )  # fmt: skip
    to_x.copy_to(dx)
    to_residual.copy_to(dresidual)
    return dx, dweight, dbias, dresidual


def _workspace(launch: Launch, kernels: ModuleType, acc: torch.dtype, device: torch.device) -> Tensor:
    rows = kernels.COEFFICIENT_ROWS + kernels.PARTIAL_ROWS * launch.splits
    return torch.empty(rows * launch.padded_channels, dtype=acc, device=device)


def _coefficients(workspace: Tensor, launch: Launch) -> Tensor:
    """The rows of a forward's workspace that the repair reads: pivot, scale, shift, and what is to be repaired."""
    rows = kernels_forward.COEFFICIENT_ROWS
    return workspace[: rows * launch.padded_channels].view(rows, launch.padded_channels)


def _geometry(launch: Launch, shape: Layout) -> tuple[int, ...]:
    """The arguments from ``outer_size`` to ``row_bytes`` of every kernel."""
    return (
        shape.outer, shape.channels, shape.inner // launch.vector, launch.chunks, launch.items, launch.items_per_split,
        launch.padded_channels, (shape.inner + 7) // 8,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _tile(launch: Launch, acc: torch.dtype, activation: str | None) -> tuple[tuple[str, Any], ...]:
    """The constants of every kernel."""
    return (
        ("ACC", _ACC[acc]), ("ACTIVATION", ACTIVATION_CODES[activation]), ("CHANNELS_LAST", launch.channels_last),
        ("OUTER", launch.outer), ("INNER", launch.inner), ("VECTOR", launch.vector),
        ("num_warps", launch.num_warps), ("maxnreg", launch.max_registers),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _sums(launch: Launch, acc: torch.dtype) -> tuple[tuple[str, Any], ...]:
    """The constants of kernels that sum."""
    return (
        ("GROUP", launch.group), ("GROUP_ROWS", launch.group_rows), ("MERGE_ROWS", launch.merge_rows(acc.itemsize)),
    )  # fmt: skip


def _in_vectors(vector: int, strides: tuple[int, ...]) -> list[int]:
    return [stride // vector for stride in strides]


def _as_bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
