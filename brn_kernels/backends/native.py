"""The C++ and CUDA kernels of csrc/, where they have been built: on CPUs, and on GPUs without Triton."""

from __future__ import annotations

import ctypes
import functools
import itertools
from pathlib import Path

import torch
from torch import Tensor

from .. import build
from . import layout, reference, sides
from .in_cpp import BackwardCall, Call, InCpp, NativeKernels
from .sides import copy_back, dense

ACTIVATION_CODES = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "hardswish": 4}  # csrc/arguments.h


def unusable(device_type: str) -> str | None:
    """Why the kernels cannot run on that type of device; None if they can."""
    if device_type not in ("cpu", "cuda"):
        return f"its kernels run on CPUs and NVIDIA GPUs, not on {device_type}"
    if device_type == "cuda" and torch.version.hip is not None:
        return "its kernels run on NVIDIA GPUs, not on AMD's"
    reason = _load().get(device_type)
    return _gpu_refuses() if reason is None and device_type == "cuda" else reason


def is_fused(x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None) -> bool:
    """Whether the kernels do this call; what they do not is the reference backend's."""
    return mask is None and x.numel() > 0


@functools.cache
def _load() -> dict[str, str | None]:
    """Load what is built; for each type of device, why it has no kernels."""
    built = build.find()
    if isinstance(built, str):
        return {"cpu": built, "cuda": built}
    missing: dict[str, str | None] = {"cpu": None, "cuda": None}
    if reason := _cannot_load(built.cpu):
        return {"cpu": reason, "cuda": reason}
    if built.cuda is None:
        missing["cuda"] = "built without CUDA: run `brn build --cuda`"
    elif torch.version.cuda is None:
        missing["cuda"] = "this PyTorch has no CUDA"
    else:
        # linked with no library of CUDA's, so that a torch without can build it: what it calls must be there already
        missing["cuda"] = _cannot_load(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so", of_torch=True)
        missing["cuda"] = missing["cuda"] or _cannot_load(built.cuda)
    return missing


def _gpu_refuses() -> str | None:
    """Why the current GPU runs none of the kernels: no code for it, a driver that is too old ...; None if it does."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    device = torch.cuda.current_device()  # another would cost it a context, some hundred MB
    error = torch.ops.brn_kernels_native.device_error(device)
    if not error:
        return None
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return f"{name} (sm_{capability[0]}{capability[1]}): {error}; `brn build --cuda` compiles for what it is told"


def _cannot_load(library: Path, of_torch: bool = False) -> str | None:
    """Load it; if that fails, why. ``of_torch``: for what is loaded after it to call, not for operators."""
    try:
        if of_torch:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        else:
            torch.ops.load_library(library)
    except OSError as error:
        return f"{library} cannot be loaded: {error.__cause__ or error}"
    return None


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
    """``reference.forward``; a mask is left to it."""
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
    shape, (of_x, of_residual, of_y) = memory.layout, memory.strides
    y = torch.empty_like(x)
    saved = torch.empty(4, shape.channels, dtype=reference.statistics_dtype(x), device=x.device)
    bits = None
    if wants_bits and reference.keeps_bits(residual, activation):
        bits = torch.empty(layout.bits_shape(shape), dtype=torch.uint8, device=x.device)
    dense_mean, dense_var, dense_clipped = dense(running_mean), dense(running_var), dense(clipped)
    dense_state = dense(auto_state)
    torch.ops.brn_kernels_native.forward(
        x, residual, y, bits, dense(weight), dense(bias), dense_mean, dense_var, num_batches_tracked,
        dense_clipped, dense(limits), dense_state, saved, shape, (*of_x, *of_residual, *of_y), schedule, momentum, eps,
        ACTIVATION_CODES[activation], coefficients, _workspace(x, shape),
    )  # fmt: skip
    copy_back(
        ((dense_mean, running_mean), (dense_var, running_var), (dense_clipped, clipped), (dense_state, auto_state))
    )
    return y, saved, bits


def apply(x: Tensor, coefficients: Tensor, activation: str | None) -> Tensor:
    """Y of the ``coefficients`` that ``forward`` filled, in one pass."""
    memory = sides.memory_of(x)
    if not memory.fits:
        return torch.empty_like(x).copy_(apply(sides.copied(x, memory.layout), coefficients, activation))
    shape, (of_x, of_y) = memory.layout, memory.strides
    y = torch.empty_like(x)
    torch.ops.brn_kernels_native.apply(
        x, y, coefficients, shape, (*of_x, *of_y), ACTIVATION_CODES[activation], _workspace(x, shape)
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
    """``reference.backward``; a mask is left to it."""
    if not is_fused(x, residual, mask, activation):
        return reference.backward(
            dy, x, residual, mask, weight, bias, saved, bits, activation, needs_dx, needs_dresidual
        )
    if bits is not None or activation is None:
        residual = None
    memory = sides.memory_of(x, dy, residual)
    if not memory.fits:
        return sides.backward_of_copies(
            backward, dy, x, residual, mask, weight, bias, saved, bits, activation, needs_dx, needs_dresidual
        )
    shape, (of_x, of_dy, of_residual, of_results) = memory.layout, memory.strides
    dx = torch.empty_like(x) if needs_dx else None
    dresidual = torch.empty_like(x) if needs_dresidual else None
    dweight = torch.empty(shape.channels, dtype=saved.dtype, device=x.device)
    dbias = torch.empty(shape.channels, dtype=saved.dtype, device=x.device)
    torch.ops.brn_kernels_native.backward(
        dy, x, residual, dense(bits), dense(weight), dense(bias), saved.contiguous(), dx, dresidual, dweight, dbias,
        shape, (*of_dy, *of_x, *of_residual, *of_results, *of_results), ACTIVATION_CODES[activation],
        _workspace(x, shape),
    )  # fmt: skip
    return dx, dweight, dbias, dresidual


def forward_in_cpp(call: Call, wants_bits: bool = True) -> InCpp | None:
    """What ``csrc/autograd`` calls for such a call, whether it wants bits or not."""
    memory = sides.memory_of(call.x, call.residual)
    return _in_cpp("forward", call, memory, memory.strides)


def backward_in_cpp(call: BackwardCall) -> InCpp | None:
    """Likewise, of a dy that lies as y does."""
    memory = sides.memory_of(call.x, call.residual)
    of_x, of_residual, of_results = memory.strides
    return _in_cpp("backward", call, memory, (of_results, of_x, of_residual, of_results, of_results))


def _in_cpp(
    direction: str, call: Call | BackwardCall, memory: sides.Memory, strides: tuple[tuple[int, int], ...]
) -> InCpp | None:
    x = call.x
    if not is_fused(x, call.residual, None, call.activation) or not memory.fits:
        return None
    workspace = _workspace_bytes(memory.layout, x.dtype, x.device)
    return InCpp(
        NativeKernels(
            f"brn_kernels_native::{direction}", tuple(memory.layout), tuple(itertools.chain(*strides)),
            ACTIVATION_CODES[call.activation], workspace,
        )
    )  # fmt: skip


def _workspace(x: Tensor, shape: layout.Layout) -> Tensor | None:
    """Scratch memory for a call; made here, so that running out of memory is PyTorch's ``OutOfMemoryError``."""
    size = _workspace_bytes(shape, x.dtype, x.device)
    return torch.empty(size, dtype=torch.uint8, device=x.device) if size else None


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(shape: layout.Layout, dtype: torch.dtype, device: torch.device) -> int:
    return torch.ops.brn_kernels_native.workspace_bytes(torch.empty(0, dtype=dtype, device=device), shape)
