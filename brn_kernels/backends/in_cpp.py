"""What a backend tells ``csrc/autograd`` of a kind of call, so that it runs without interpreting any Python.

A backend's ``forward_in_cpp(call)`` and ``backward_in_cpp(call)`` return :class:`InCpp`, or None where that is not
possible, or not before a kernel has been compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The arguments of an ordinary training call, as ``csrc/autograd/calls.cpp`` takes them."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    clipped: Tensor | None
    limits: Tensor | None
    auto_state: Tensor | None
    schedule: tuple[float, ...]
    momentum: float | None
    eps: float
    activation: str | None


class BackwardCall(NamedTuple):
    """What a backward's kernels follow from, of a dy that lies as y does."""

    x: Tensor
    residual: Tensor | None  # if it is read
    weight: Tensor | None
    bias: Tensor | None
    activation: str | None
    has_bits: bool
    needs_dx: bool
    needs_dresidual: bool


class NativeKernels(NamedTuple):
    """Those of one direction: a call of an operator of ``csrc/ops.cpp``."""

    operator: str
    layout: tuple[int, ...]
    strides: tuple[int, ...]  # (outer, channel) of each activation tensor, in the operator's order
    activation: int
    workspace: int  # bytes


class TritonLaunch(NamedTuple):
    """One launch, by the CUDA driver.

    ``parameters`` are the kernel's, in its order: a name, and its value, or None if it is the call's own.
    """

    compiled: Any  # Triton's, kept so that its code stays loaded
    function: int  # a CUfunction
    grid_x: int
    grid_y: int
    threads: int
    shared: int  # bytes
    parameters: tuple[tuple[str, int | float | None], ...]


# The functions that C++ is given the addresses of, in the order of ``Driver`` in ``triton.cpp``: the CUDA driver's, and
# one of PyTorch's.
DRIVER_FUNCTIONS = (
    "cuLaunchKernel", "cuStreamIsCapturing", "cuGetErrorString", "cuCtxGetCurrent", "cuDeviceGet",
    "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "aoti_torch_get_current_cuda_stream",
)  # fmt: skip


class TritonKernels(NamedTuple):
    """Those of one direction."""

    driver: tuple[int, ...]  # addresses of ``DRIVER_FUNCTIONS``
    launches: tuple[TritonLaunch, ...]
    workspace: int  # numbers of the statistics' dtype
    tickets: int  # counters
    tickets_of: Callable[..., Tensor]  # (device, tickets): ``triton.tickets``


OneDirection = NativeKernels | TritonKernels


class InCpp(NamedTuple):
    """The kernels of a direction, and what says whether a call must be left to Python, if anything can."""

    kernels: OneDirection
    unless: Callable[[], bool] | None = None


def whose(kernels: OneDirection) -> tuple[str, tuple[Any, ...]]:
    """As ``csrc/autograd`` takes them."""
    return ("native" if isinstance(kernels, NativeKernels) else "triton"), kernels
