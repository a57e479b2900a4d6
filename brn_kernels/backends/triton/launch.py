"""From tensors to kernel launches: two for a forward, two or one for a backward."""

from __future__ import annotations

import contextlib
import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import layout, reference
from ..layout import Layout
from . import config, kernels_backward, kernels_forward
from .config import Launch
from .kernels_common import ACTIVATION_CODES, tl
from .tickets import tickets

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


MAX_COLUMNS = 2**29  # of a row, and channels: columns and the workspace are counted in 32 bits (rows in 64)


class _Side(NamedTuple):
    """A tensor as the kernels see it: its memory fits the layout of the pass, with these (outer, channel) strides."""

    tensor: Tensor | None
    strides: tuple[int, int]

    def copy_to(self, wanted: Tensor) -> None:
        """Bring the values to the tensor they were wanted in, if they are not written there already."""
        if self.tensor is not None and self.tensor is not wanted:
            wanted.copy_(self.tensor)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.forward`` in two launches."""
    if not is_fused(x, residual, mask, activation):
        return reference.forward(
            x, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits, schedule,
            momentum, eps, activation,
        )  # fmt: skip
    shape = _layout(x.shape, x.stride())
    source, extra = _readable(x, shape), _readable(residual, shape)
    y = torch.empty_like(x)
    target = _writable(y, shape)
    device = config.device_of(x.device)
    all_strides = source.strides + extra.strides + target.strides
    kept = reference.keeps_bits(residual, activation)
    launch = config.launch_for(shape, x.element_size(), all_strides, device, many_registers=kept)

    acc = reference.statistics_dtype(x)
    saved = torch.empty(4, shape.channels, dtype=acc, device=x.device)
    bits = torch.empty(layout.bits_shape(x), dtype=torch.uint8, device=x.device) if kept else reference.empty_bits(x)
    workspace = _workspace(launch, kernels_forward, acc, x.device)
    r_max, d_max, hold, r_ramp, d_ramp = schedule
    weight, bias, limits = _dense(weight), _dense(bias), _dense(limits)
    dense_mean, dense_var, dense_clipped = _dense(running_mean), _dense(running_var), _dense(clipped)
    bits_or_none = bits if kept else None
    geometry = _geometry(launch, shape)
    strides = _in_vectors(launch.vector, all_strides)
    tile = _tile(launch, acc, activation)
    with _on_device(x):
        kernels_forward.stream_kernel[launch.grid](
            source.tensor, extra.tensor, target.tensor, bits_or_none, weight, bias, dense_mean, dense_var,
            _as_bytes(dense_clipped), num_batches_tracked, limits, saved, workspace,
            tickets(x.device, launch.channel_tiles), *geometry, *strides,
            r_max, d_max, int(hold), int(r_ramp), int(d_ramp), 0.0 if momentum is None else momentum, eps,
            float(x.numel() // shape.channels), CUMULATIVE=momentum is None, STAGES=config.STAGES, **tile,
            **_sums(launch),
        )  # fmt: skip
        kernels_forward.repair_kernel[launch.grid](
            source.tensor, extra.tensor, target.tensor, bits_or_none, num_batches_tracked, workspace,
            *geometry, *strides, **tile,
        )  # fmt: skip
    target.copy_to(y)
    for dense, updated in ((dense_mean, running_mean), (dense_var, running_var), (dense_clipped, clipped)):
        if dense is not None and updated is not None and dense is not updated:
            updated.copy_(dense)
    return y, saved, bits


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
    """``reference.backward`` in two launches, or in one where slabs of channels fit L2."""
    kept = bits.numel() > 0
    if not is_fused(x, None if kept else residual, mask, activation):
        return reference.backward(
            dy, x, residual, mask, weight, bias, saved, bits, activation, needs_dx, needs_dresidual
        )
    shape = _layout(x.shape, x.stride())
    upstream, source = _readable(dy, shape), _readable(x, shape)
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    dresidual = torch.empty_like(x) if needs_dresidual else x.new_empty(0)
    to_x = _writable(dx if needs_dx else None, shape)
    to_residual = _writable(dresidual if needs_dresidual else None, shape)
    all_strides = upstream.strides + source.strides + to_x.strides + to_residual.strides
    device = config.device_of(x.device)
    smooth = activation in ("silu", "hardswish")
    launch = config.launch_for(shape, x.element_size(), all_strides, device, many_registers=smooth)
    slab = config.slab_of(launch, shape, x.element_size(), device) if needs_dx or needs_dresidual else 0
    if slab:
        launch = config.slab_launch(launch, slab, device)

    acc = saved.dtype
    weight, bias, saved, bits = _dense(weight), _dense(bias), saved.contiguous(), bits.contiguous()
    dweight = torch.empty(shape.channels, dtype=acc, device=x.device)
    dbias = torch.empty(shape.channels, dtype=acc, device=x.device)
    workspace = _workspace(launch, kernels_backward, acc, x.device)
    tensors = (upstream.tensor, source.tensor, bits if kept else None, weight, bias, saved)
    targets = (to_x.tensor, to_residual.tensor)
    geometry = _geometry(launch, shape)
    strides = _in_vectors(launch.vector, all_strides)
    values = float(x.numel() // shape.channels)
    tile, sums = _tile(launch, acc, activation), _sums(launch)
    with _on_device(x):
        if slab:
            kernels_backward.slabs_kernel[(config.slab_programs(launch, slab, device),)](
                *tensors, dweight, dbias, *targets, workspace, tickets(x.device, 2 + 2 * launch.channel_tiles),
                *geometry, *strides, launch.channel_tiles, slab, launch.splits, values, **tile, **sums,
            )  # fmt: skip
        else:
            kernels_backward.reduce_kernel[launch.grid](
                *tensors, dweight, dbias, workspace, tickets(x.device, launch.channel_tiles), *geometry, *strides[:4],
                values, **tile, **sums,
            )  # fmt: skip
            if needs_dx or needs_dresidual:
                kernels_backward.apply_kernel[launch.grid](*tensors, *targets, workspace, *geometry, *strides, **tile)
    to_x.copy_to(dx)
    to_residual.copy_to(dresidual)
    return dx, dweight, dbias, dresidual


def _readable(tensor: Tensor | None, shape: Layout) -> _Side:
    """The tensor, or a dense copy of it in the layout of the pass if its memory does not fit that."""
    side = _writable(tensor, shape)
    if tensor is not None and side.tensor is not None and side.tensor is not tensor:
        side.tensor.copy_(tensor)
    return side


def _writable(tensor: Tensor | None, shape: Layout) -> _Side:
    """The tensor, or a dense one to be copied from if its memory does not fit the layout of the pass."""
    if tensor is None:
        return _Side(None, (0, 0))
    strides = _strides(tensor.shape, tensor.stride(), shape)
    return _Side(layout.empty_in(shape, tensor), _dense_strides(shape)) if strides is None else _Side(tensor, strides)


# What follows from shapes and strides alone is found once: training repeats them, and small layers are host-bound.


@functools.lru_cache(maxsize=4096)
def _layout(shape: torch.Size, strides: tuple[int, ...]) -> Layout:
    return layout.layout_of(torch.empty_strided(shape, strides, device="meta"))


@functools.lru_cache(maxsize=4096)
def _strides(shape: torch.Size, strides: tuple[int, ...], seen_as: Layout) -> tuple[int, int] | None:
    """(outer, channel) strides, the latter 0 in channels_last, where channels are a tile's columns."""
    found = layout.strides_in(torch.empty_strided(shape, strides, device="meta"), seen_as)
    return (found[0], 0) if found is not None and seen_as.channels_last else found


def _dense_strides(shape: Layout) -> tuple[int, int]:
    outer, channel = layout.dense_strides(shape)
    return outer, 0 if shape.channels_last else channel


def _workspace(launch: Launch, kernels: ModuleType, acc: torch.dtype, device: torch.device) -> Tensor:
    rows = kernels.COEFFICIENT_ROWS + kernels.PARTIAL_ROWS * launch.splits
    return torch.empty(rows * launch.padded_channels, dtype=acc, device=device)


def _geometry(launch: Launch, shape: Layout) -> tuple[int, ...]:
    """The arguments from ``outer_size`` to ``row_bytes`` of every kernel."""
    return (
        shape.outer, shape.channels, shape.inner // launch.vector, launch.chunks, launch.items, launch.items_per_split,
        launch.padded_channels, (shape.inner + 7) // 8,
    )  # fmt: skip


def _tile(launch: Launch, acc: torch.dtype, activation: str | None) -> dict[str, Any]:
    """The constants of every kernel."""
    return {
        "ACC": _ACC[acc], "ACTIVATION": ACTIVATION_CODES[activation], "CHANNELS_LAST": launch.channels_last,
        "OUTER": launch.outer, "INNER": launch.inner, "VECTOR": launch.vector,
        "num_warps": launch.num_warps, "maxnreg": launch.max_registers,
    }  # fmt: skip


def _sums(launch: Launch) -> dict[str, Any]:
    """The constants of kernels that sum."""
    return {"GROUP": launch.group, "GROUP_ROWS": launch.group_rows, "MERGE_ROWS": config.MERGE_ROWS}


def _in_vectors(vector: int, strides: tuple[int, ...]) -> list[int]:
    return [stride // vector for stride in strides]


def _dense(values: Tensor | None) -> Tensor | None:
    """Values per channel as the kernels read them: one after the other."""
    return None if values is None else values.contiguous()


def _as_bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
