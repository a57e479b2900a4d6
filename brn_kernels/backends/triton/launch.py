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
from ..in_cpp import BackwardCall, Call, InCpp, TritonKernels
from ..sides import Memory, copy_back, dense
from . import config, kernels_backward, kernels_forward, launcher
from .config import Launch
from .kernels_common import ACTIVATION_CODES, tl
from .launcher import Constants
from .tickets import tickets

_NOTHING_TO_DO = contextlib.nullcontext()
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def is_fused(x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None) -> bool:
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
    wants_bits: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``reference.forward`` in two launches, or in one."""
    if not is_fused(x, residual, mask, activation):
        return reference.forward(
            x, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits, schedule,
            momentum, eps, activation, auto_state, wants_bits,
        )  # fmt: skip
    memory = sides.memory_of(x, residual)
    if not memory.fits:
        return sides.forward_of_copies(
            forward, x, residual, mask, weight, bias, running_mean, running_var, num_batches_tracked, clipped, limits,
            schedule, momentum, eps, activation, coefficients, auto_state, wants_bits,
        )  # fmt: skip
    kept = wants_bits and reference.keeps_bits(residual, activation)
    plan = _plan("forward", memory, x.dtype, x.device, activation, kept, momentum is None)

    y = torch.empty_like(x)
    saved = torch.empty(4, memory.layout.channels, dtype=plan.acc, device=x.device)
    bits = torch.empty(layout.bits_shape(memory.layout), dtype=torch.uint8, device=x.device) if kept else None
    workspace = None
    if coefficients is not None or not plan.launch.alone:
        workspace = torch.empty(plan.workspace, dtype=plan.acc, device=x.device)
    r_max, d_max, hold, r_ramp, d_ramp = schedule
    dense_mean, dense_var, dense_clipped = dense(running_mean), dense(running_var), dense(clipped)
    dense_state = dense(auto_state)
    tensors = {
        "x": x, "residual": residual, "y": y, "bits": bits, "weight": dense(weight), "bias": dense(bias),
        "running_mean": dense_mean, "running_var": dense_var, "clipped": dense_clipped, "counter": num_batches_tracked,
        "limits": dense(limits), "auto": dense_state, "saved": saved, "workspace": workspace,
    }  # fmt: skip
    integers = (int(hold), int(r_ramp), int(d_ramp))
    floats = (r_max, d_max, 0.0 if momentum is None else momentum, eps)
    _launch(plan, tensors, integers, floats)
    copy_back(
        ((dense_mean, running_mean), (dense_var, running_var), (dense_clipped, clipped), (dense_state, auto_state))
    )
    if coefficients is not None:
        assert workspace is not None  # made above
        coefficients.copy_(_coefficients(workspace, plan.launch)[:3, : memory.layout.channels])
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
    _launch(plan, {"x": x, "y": y, "workspace": workspace})
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
    writes = needs_dx or needs_dresidual
    plan = _plan("backward", memory, x.dtype, x.device, activation, bits is not None, writes=writes)
    channels, acc = memory.layout.channels, plan.acc
    workspace = torch.empty(plan.workspace, dtype=acc, device=x.device) if plan.shares else None
    dx = torch.empty_like(x) if needs_dx else None
    dresidual = torch.empty_like(x) if needs_dresidual else None
    dweight, dbias = (torch.empty(channels, dtype=acc, device=x.device) for _ in range(2))
    tensors = {
        "dy": dy, "x": x, "bits": dense(bits), "weight": dense(weight), "bias": dense(bias),
        "saved": saved.contiguous(), "dweight": dweight, "dbias": dbias, "dx": dx, "dresidual": dresidual,
        "workspace": workspace,
    }  # fmt: skip
    _launch(plan, tensors)
    return dx, dweight, dbias, dresidual


def forward_in_cpp(call: Call, wants_bits: bool = True) -> InCpp | None:
    """What ``csrc/autograd`` launches for such a call; None, too, if a kernel of it has not been launched before."""
    x, residual, activation = call.x, call.residual, call.activation
    memory = sides.memory_of(x, residual)
    if not is_fused(x, residual, None, activation) or not memory.fits:
        return None
    kept = wants_bits and reference.keeps_bits(residual, activation)
    plan = _plan("forward", memory, x.dtype, x.device, activation, kept, call.momentum is None)
    given = {
        "x": x, "residual": residual, "y": x, "weight": call.weight, "bias": call.bias,
        "running_mean": call.running_mean, "running_var": call.running_var, "clipped": call.clipped,
        "counter": call.num_batches_tracked, "limits": call.limits, "auto": call.auto_state,
    }  # fmt: skip
    dtypes = _dtypes(given) | {"saved": plan.acc, "bits": torch.uint8 if kept else None}
    return _prepared(plan, dtypes)


def backward_in_cpp(call: BackwardCall) -> InCpp | None:
    """Likewise, of a dy that lies as y does."""
    x, activation = call.x, call.activation
    memory = sides.memory_of(x, torch.empty_like(x, device="meta"))
    if not is_fused(x, call.residual, None, activation) or not memory.fits:
        return None
    writes = call.needs_dx or call.needs_dresidual
    plan = _plan("backward", memory, x.dtype, x.device, activation, call.has_bits, writes=writes)
    given = {
        "dy": x, "x": x, "weight": call.weight, "bias": call.bias, "dx": x if call.needs_dx else None,
        "dresidual": x if call.needs_dresidual else None,
    }  # fmt: skip
    dtypes = _dtypes(given) | dict.fromkeys(("saved", "dweight", "dbias"), plan.acc)
    return _prepared(plan, dtypes | {"bits": torch.uint8 if call.has_bits else None})


def _dtypes(tensors: dict[str, Tensor | None]) -> dict[str, torch.dtype | None]:
    return {name: None if tensor is None else tensor.dtype for name, tensor in tensors.items()}


def _prepared(plan: Plan, dtypes: dict[str, torch.dtype | None]) -> InCpp | None:
    """What ``_launch`` launches, for ``csrc/autograd``; None if it has not been launched before."""
    driver = launcher.driver()
    if driver is None:
        return None
    dtypes = dtypes | {"workspace": plan.acc if plan.shares else None, "tickets": torch.int32}
    launches = []
    for step in plan.steps:
        numbers = (*plan.integers[: step.integers], *([plan.values] if step.sums else []))
        kernel, grid = step.kernel(), plan.launch.grid
        prepared = launcher.prepared(kernel, grid, step.pointers, dtypes, numbers, step.constants)
        if prepared is None:
            return None
        launches.append(prepared)
    workspace, counters = plan.workspace if plan.shares else 0, plan.tickets if plan.counts else 0
    found = TritonKernels(driver, tuple(launches), workspace, counters, tickets)
    return InCpp(found, unless=launcher.is_profiled)


def _launch(
    plan: Plan, tensors: dict[str, Tensor | None], integers: tuple[int, ...] = (), floats: tuple[float, ...] = ()
) -> None:
    """All launches of a plan; ``integers`` and ``floats`` are the layer's own numbers (``launcher.SETTINGS``)."""
    x, grid = tensors["x"], plan.launch.grid
    assert x is not None
    with _on_device(x):
        if plan.counts:
            tensors["tickets"] = tickets(x.device, plan.tickets)
        for step in plan.steps:
            pointers, its_integers = tuple(map(tensors.get, step.pointers)), plan.integers[: step.integers]
            numbers = (its_integers + integers, (*floats, plan.values)) if step.sums else (its_integers, ())
            launcher.launch(step.kernel(), grid, pointers, *numbers, step.constants, x.device)


class Step(NamedTuple):
    """A launch."""

    module: ModuleType
    name: str  # of the kernel in it
    pointers: tuple[str, ...]  # names of its parameters, without ``_ptr``
    integers: int  # how many of the plan's
    sums: bool  # it also takes the layer's own numbers, if there are any, and how many values a channel has
    constants: Constants

    def kernel(self) -> Any:
        """What is launched now: benchmarks put others in its place."""
        return getattr(self.module, self.name)


class Plan(NamedTuple):
    """What a call needs that follows from shapes, strides and dtypes: found once, since small layers are host-bound."""

    launch: Launch
    acc: torch.dtype  # of statistics and arithmetic
    integers: tuple[int, ...]  # a kernel's arguments from ``outer_size`` to the last stride
    steps: tuple[Step, ...]  # a kernel that sums, then one that only writes; one of them, or one that does both
    values: float  # of a channel
    workspace: int  # numbers, where a launch needs one
    shares: bool  # what programs find goes to others, by way of a workspace
    tickets: int  # counters, if ``counts``
    counts: bool


@functools.lru_cache(maxsize=4096)
def _plan(
    direction: str,
    memory: Memory,
    dtype: torch.dtype,
    device: torch.device,
    activation: str | None,
    has_bits: bool,
    cumulative: bool = False,
    writes: bool = True,
) -> Plan:
    """Of a "forward", a "backward" (which ``writes``, or only sums), or an "apply": a forward that only writes."""
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
    integers = (*geometry, *(stride // launch.vector for stride in strides))
    values = shape.outer * (1 if shape.channels_last else shape.inner)
    rows = kernels.COEFFICIENT_ROWS.value + kernels.PARTIAL_ROWS.value * (launch.splits + bundles)
    steps = _steps(direction, launch, writes, Constants(**tile, **sums), Constants(**tile))
    shares = "workspace" in steps[0].pointers and (is_backward or not launch.alone)
    return Plan(
        launch, acc, integers, steps, float(values), rows * launch.padded_channels, shares,
        1 if not is_backward and launch.alone else launch.channel_tiles * (bundles + (bundles > 1)),
        "tickets" in steps[0].pointers,
    )  # fmt: skip


def _steps(direction: str, launch: Launch, writes: bool, summing: Constants, writing: Constants) -> tuple[Step, ...]:
    second = None
    if direction == "apply":
        return (_step(kernels_forward, "repair_kernel", writing),)
    if direction == "forward":
        first = "resident_forward_kernel" if launch.resident else "stream_kernel"
        second = None if launch.alone else "repair_kernel"
    elif launch.resident or (launch.alone and writes):
        first = "resident_backward_kernel" if launch.resident else "alone_kernel"
    else:
        first, second = "reduce_kernel", "apply_kernel" if writes else None
    module = kernels_forward if direction == "forward" else kernels_backward
    return (_step(module, first, summing), *([] if second is None else [_step(module, second, writing)]))


def _step(module: ModuleType, name: str, constants: Constants) -> Step:
    names = [parameter for parameter in getattr(module, name).arg_names if parameter not in constants.values]
    pointers = tuple(each.removesuffix("_ptr") for each in names if each.endswith("_ptr"))
    numbers = [each for each in names[len(pointers) :] if each not in launcher.SETTINGS]
    sums = "values" in numbers
    return Step(module, name, pointers, len(numbers) - sums, sums, constants)


def forget() -> None:
    """Find launches anew, for who changes what they follow from (``config``). C++'s: ``node.forget``."""
    config.launch_for.cache_clear()
    _plan.cache_clear()


def _coefficients(workspace: Tensor, launch: Launch) -> Tensor:
    """The rows of a forward's workspace that the repair reads: pivot, scale, shift, and what is to be repaired."""
    rows = kernels_forward.COEFFICIENT_ROWS.value
    return workspace[: rows * launch.padded_channels].view(rows, launch.padded_channels)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    if x.device.type != "cuda" or x.device.index == torch._C._cuda_getDevice():  # a CUDA tensor has initialized CUDA
        return _NOTHING_TO_DO
    return torch.cuda.device(x.device)
