"""From tensors to kernel launches: two for each direction, or one where a program has whole channels to itself."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import layout, reference, sides
from ..sides import Memory, copy_back, dense
from . import config, kernels_backward, kernels_forward, launcher
from .config import Launch
from .kernels_common import ACTIVATION_CODES, tl
from .launcher import Constants
from .tickets import tickets

_NOTHING_TO_DO = contextlib.nullcontext()
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def is_fused(
    x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None, auto: bool = False
) -> bool:
    """Whether the kernels do this call; what they do not is the reference backend's."""
    if x.numel() >= config.MAX_COLUMNS and max(x.shape[1], math.prod(x.shape[2:])) >= config.MAX_COLUMNS:
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
    auto_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``reference.forward`` in two launches, or in one."""
    if not is_fused(x, residual, mask, activation):
        return reference.forward(
            x, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits, schedule,
            momentum, eps, activation, auto_state,
        )  # fmt: skip
    memory = sides.memory_of(x, residual)
    if not memory.fits:
        return sides.forward_of_copies(
            forward, x, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits,
            schedule, momentum, eps, activation, coefficients, auto_state,
        )  # fmt: skip
    kept = reference.keeps_bits(residual, activation)
    plan = _plan("forward", memory, x.dtype, x.device, activation, kept, momentum is None)
    launch = plan.launch

    y = torch.empty_like(x)
    saved = torch.empty(4, memory.layout.channels, dtype=plan.acc, device=x.device)
    bits = torch.empty(layout.bits_shape(memory.layout), dtype=torch.uint8, device=x.device) if kept else None
    workspace = None
    if coefficients is not None or not launch.alone:
        workspace = torch.empty(plan.workspace, dtype=plan.acc, device=x.device)
    r_max, d_max, hold, r_ramp, d_ramp = schedule
    weight, bias, limits = dense(weight), dense(bias), dense(limits)
    dense_mean, dense_var, dense_clipped = dense(running_mean), dense(running_var), dense(clipped)
    dense_state = dense(auto_state)
    integers = (*plan.integers, int(hold), int(r_ramp), int(d_ramp))
    floats = (r_max, d_max, 0.0 if momentum is None else momentum, eps, plan.values)
    resident, stream = kernels_forward.resident_forward_kernel, kernels_forward.stream_kernel
    with _on_device(x):
        launcher.launch(
            resident if launch.resident else stream, launch.grid,
            (x, residual, y, bits, weight, bias, dense_mean, dense_var, dense_clipped,
             num_batches_tracked, limits, dense_state, saved, workspace, tickets(x.device, plan.tickets)),
            integers, floats, plan.summing, x.device,
        )  # fmt: skip
        if not launch.alone:
            launcher.launch(
                kernels_forward.repair_kernel, launch.grid,
                (x, residual, y, bits, num_batches_tracked, workspace),
                plan.integers, (), plan.writing, x.device,
            )  # fmt: skip
    copy_back(
        ((dense_mean, running_mean), (dense_var, running_var), (dense_clipped, clipped), (dense_state, auto_state))
    )
    if coefficients is not None:
        assert workspace is not None  # made above
        coefficients.copy_(_coefficients(workspace, launch)[:3, : memory.layout.channels])
    return y, saved, bits


def apply(x: Tensor, coefficients: Tensor, activation: str | None) -> Tensor:
    """Y of the ``coefficients`` that ``forward`` filled: every channel is repaired."""
    memory = sides.memory_of(x, None)
    if not memory.fits:
        return torch.empty_like(x).copy_(apply(sides.copied(x, memory.layout), coefficients, activation))
    y = torch.empty_like(x)
    plan = _plan("apply", memory, x.dtype, x.device, activation, False)
    workspace = torch.ones(plan.workspace, dtype=coefficients.dtype, device=x.device)
    _coefficients(workspace, plan.launch)[:3, : memory.layout.channels] = coefficients
    with _on_device(x):
        launcher.launch(
            kernels_forward.repair_kernel, plan.launch.grid, (x, None, y, None, None, workspace), plan.integers, (),
            plan.writing, x.device,
        )  # fmt: skip
    return y


def backward(
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
    """``reference.backward`` in two launches, or in one."""
    if bits is not None:
        residual = None
    if not is_fused(x, residual, mask, activation):
        return reference.backward(
            dy, x, residual, mask, weight, bias, saved, bits, activation, needs_dx, needs_dresidual
        )
    memory = sides.memory_of(x, dy)
    if not memory.fits:
        return sides.backward_of_copies(
            backward, dy, x, residual, mask, weight, bias, saved, bits, activation, needs_dx, needs_dresidual
        )
    plan = _plan("backward", memory, x.dtype, x.device, activation, bits is not None)
    launch, acc = plan.launch, plan.acc

    weight, bias, saved, bits = dense(weight), dense(bias), saved.contiguous(), dense(bits)
    dx = torch.empty_like(x) if needs_dx else None
    dresidual = torch.empty_like(x) if needs_dresidual else None
    dweight = torch.empty(memory.layout.channels, dtype=acc, device=x.device)
    dbias = torch.empty(memory.layout.channels, dtype=acc, device=x.device)
    tensors, targets = (dy, x, bits, weight, bias, saved), (dx, dresidual)
    resident, alone = kernels_backward.resident_backward_kernel, kernels_backward.alone_kernel
    with _on_device(x):
        if launch.resident or (launch.alone and (needs_dx or needs_dresidual)):
            launcher.launch(
                resident if launch.resident else alone, launch.grid, (*tensors, dweight, dbias, *targets),
                plan.integers, (plan.values,), plan.summing, x.device,
            )  # fmt: skip
        else:
            workspace = torch.empty(plan.workspace, dtype=acc, device=x.device)
            launcher.launch(
                kernels_backward.reduce_kernel, launch.grid,
                (*tensors, dweight, dbias, workspace, tickets(x.device, plan.tickets)),
                plan.integers[:-4], (plan.values,), plan.summing, x.device,
            )  # fmt: skip
            if needs_dx or needs_dresidual:
                launcher.launch(
                    kernels_backward.apply_kernel, launch.grid, (*tensors, *targets, workspace),
                    plan.integers, (), plan.writing, x.device,
                )  # fmt: skip
    return dx, dweight, dbias, dresidual


def backward_kernels(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    has_bits: bool,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Any, ...] | None:
    """What ``csrc/autograd`` needs to run this backward, of a dy that lies as x does; None if it cannot (yet).

    That is one launch, which has been made before. ``residual`` is the one the backward reads; weight and bias are
    dense.
    """
    if not is_fused(x, residual, None, activation):
        return None
    memory = sides.memory_of(x, x)
    if not memory.fits or not (needs_dx or needs_dresidual):
        return None
    plan = _plan("backward", memory, x.dtype, x.device, activation, has_bits)
    launch, acc = plan.launch, plan.acc
    if not launch.resident and not launch.alone:
        return None
    dtypes = (
        x.dtype, x.dtype, torch.uint8 if has_bits else None, None if weight is None else weight.dtype,
        None if bias is None else bias.dtype, acc, acc, acc, x.dtype if needs_dx else None,
        x.dtype if needs_dresidual else None,
    )  # fmt: skip
    kernel = kernels_backward.resident_backward_kernel if launch.resident else kernels_backward.alone_kernel
    return launcher.prepared(kernel, launch.grid, dtypes, plan.integers, (plan.values,), plan.summing, x.device)


class Plan(NamedTuple):
    """What a call needs that follows from shapes, strides and dtypes: found once, since small layers are host-bound."""

    launch: Launch
    acc: torch.dtype  # of statistics and arithmetic
    integers: tuple[int, ...]  # a kernel's arguments from ``outer_size`` to the last stride
    summing: Constants  # of the kernel that sums
    writing: Constants  # of the one that only writes
    values: float  # of a channel
    workspace: int  # elements, where a launch needs one
    tickets: int


@functools.lru_cache(maxsize=4096)
def _plan(
    direction: str,
    memory: Memory,
    dtype: torch.dtype,
    device: torch.device,
    activation: str | None,
    has_bits: bool,
    cumulative: bool = False,
) -> Plan:
    """Of a "forward", a "backward", or an "apply": a forward that only writes."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    is_backward = direction == "backward"
    shape, sides_in_turn = memory.layout, memory.strides
    if is_backward:
        x, dy, like_x = memory.strides
        sides_in_turn = dy, x, like_x, like_x
    strides = tuple(itertools.chain(*sides_in_turn))
    kernels: ModuleType = kernels_backward if is_backward else kernels_forward
    launch = config.launch_for(
        "backward" if is_backward else "forward", shape, dtype.itemsize, strides, config.multiprocessors_of(device),
        has_bits, activation in ("silu", "hardswish"), direction != "apply",
    )  # fmt: skip
    bundle = launch.bundle(acc.itemsize)
    bundles = -(-launch.splits // bundle)
    geometry = (
        shape.outer, shape.channels, launch.row // launch.vector, launch.chunks, launch.items, bundle,
        launch.padded_channels, (shape.inner + 7) // 8, launch.plane,
    )  # fmt: skip
    tile = {
        "ACC": _ACC[acc], "ACTIVATION": ACTIVATION_CODES[activation], "CHANNELS_LAST": launch.channels_last,
        "OUTER": launch.outer, "INNER": launch.inner, "CT": launch.tile_channels, "VECTOR": launch.vector,
        "num_warps": launch.num_warps, "maxnreg": launch.max_registers,
    }  # fmt: skip
    sums: dict[str, Any] = {} if is_backward else {"CUMULATIVE": cumulative}
    if not launch.resident:
        merge_rows = launch.merge_rows(acc.itemsize)
        sums |= {"GROUP": launch.group, "GROUP_ROWS": launch.group_rows, "MERGE_ROWS": merge_rows}
        if not is_backward:
            sums["ALONE"] = launch.alone
    values = shape.outer * (1 if shape.channels_last else shape.inner)
    rows = kernels.COEFFICIENT_ROWS + kernels.PARTIAL_ROWS * (launch.splits + bundles)
    return Plan(
        launch, acc, (*geometry, *(stride // launch.vector for stride in strides)), Constants(**tile, **sums),
        Constants(**tile), float(values), rows * launch.padded_channels,
        1 if not is_backward and launch.alone else launch.channel_tiles * (bundles + (bundles > 1)),
    )  # fmt: skip


def _coefficients(workspace: Tensor, launch: Launch) -> Tensor:
    """The rows of a forward's workspace that the repair reads: pivot, scale, shift, and what is to be repaired."""
    rows = kernels_forward.COEFFICIENT_ROWS
    return workspace[: rows * launch.padded_channels].view(rows, launch.padded_channels)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    if x.device.type != "cuda" or x.device.index == torch._C._cuda_getDevice():  # a CUDA tensor has initialized CUDA
        return _NOTHING_TO_DO
    return torch.cuda.device(x.device)
