"""Launches a Triton kernel without the work that Triton does for each argument at each launch.

``kernel[grid](...)`` looks at every argument's type and value to find the compiled kernel: a small layer's most time.
Here a compiled kernel is found by what it depends on and nothing else: its constants, which remember what was compiled
for them, the dtypes of its pointers and whether all are aligned to 16 bytes. Sizes and strides are
never specialized on (``SIZES``), which is what makes that enough.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..in_cpp import DRIVER_FUNCTIONS, TritonLaunch

ALIGNMENT = 16
_INT32_MAX = 2**31 - 1
_TORCH_CUDA = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
_VERSIONS = ("3.6", "3.7", "3.8")  # whose compiled kernels are launched as below
# What a kernel is told of a layer, at each call anew.
SETTINGS: dict[str, type] = dict.fromkeys(("r_max", "d_max", "momentum", "eps"), float) | dict.fromkeys(
    ("hold", "r_ramp", "d_ramp"), int
)
_version_is_known = triton.__version__.rpartition(".")[0] in _VERSIONS


class Constants:
    """Constexprs and Triton's options of launches on one device, by name, and the kernels compiled with them."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    pointers: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    floats: tuple[float, ...],
    constants: Constants,
    device: torch.device,
) -> None:
    """``kernel[grid](*pointers, *integers, *floats, **constants.values)``.

    Args:
        kernel: whose parameters come in this order: pointers, integers, floats, constants. None of its integers may
            be specialized on (``SIZES``), and its floats have a dtype.
        grid: programs in each dimension.
        pointers: tensors on ``device``, or None; bool tensors are bytes to the kernel.
        integers: sizes and strides.
        floats: all other numbers.
        constants: all else.
        device: the current device, always the same for the same constants.
    """
    key = (id(kernel), *[None if t is None else t.dtype for t in pointers])
    found = constants.compiled.get(key)
    if found is not None:
        addresses = [None if t is None else t.data_ptr() for t in pointers]
        if _is_as_compiled(addresses, integers) and not is_profiled():
            compiled, rest = found
            compiled.run(
                *grid, 1, torch._C._cuda_getCurrentRawStream(device.index), compiled.function, compiled.packed_metadata,
                None, None, None, *addresses, *integers, *floats, *rest,
            )  # fmt: skip
            return
    as_bytes = [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in pointers]
    compiled = kernel[grid](*as_bytes, *integers, *floats, **constants.values)
    if found is None and _is_known(kernel, device):
        if _is_as_compiled([None if t is None else t.data_ptr() for t in pointers], integers):
            names = kernel.arg_names[len(pointers) + len(integers) + len(floats) :]
            constants.compiled[key] = (compiled, tuple(constants.values[name] for name in names))


def prepared(
    kernel: Any,
    grid: tuple[int, int],
    pointers: tuple[str, ...],
    dtypes: Mapping[str, torch.dtype | None],
    numbers: tuple[int | float, ...],
    constants: Constants,
) -> TritonLaunch | None:
    """The same launch for ``csrc/autograd``, but for the addresses.

    None, if it has not been made by ``launch`` before, or cannot be made there.

    Args:
        kernel: as of ``launch``, and so are grid and constants.
        grid: programs.
        pointers: names of the pointers, without ``_ptr``.
        dtypes: of the pointers, by name.
        numbers: all others but for the constants and ``SETTINGS``, in the kernel's order.
        constants: all else.
    """
    found = constants.compiled.get((id(kernel), *[dtypes[name] for name in pointers]))
    if found is None or max(numbers) > _INT32_MAX:
        return None
    compiled, _ = found
    if not is_plain(compiled.metadata):
        return None
    given, parameters = iter(numbers), []
    for name, kind in compiled.src.signature.items():
        if kind == "constexpr":
            if name.endswith("_ptr") or name in constants.values:
                continue
            return None
        if name.endswith("_ptr"):
            value, expected = None, kind if kind.startswith("*") else "a pointer"
        else:
            value = None if name in SETTINGS else next(given)
            expected = "fp64" if SETTINGS.get(name) is float or isinstance(value, float) else "i32"
        if kind != expected:
            return None
        parameters.append((name.removesuffix("_ptr"), value))
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    return TritonLaunch(compiled, compiled.function, *grid, threads, shared, tuple(parameters))


@functools.cache
def driver() -> tuple[int, ...] | None:
    """Addresses of ``DRIVER_FUNCTIONS``; None if there is no driver."""
    try:
        cuda, of_torch = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL(str(_TORCH_CUDA))
        functions = [getattr(cuda if name.startswith("cu") else of_torch, name) for name in DRIVER_FUNCTIONS]
    except (OSError, AttributeError):
        return None
    return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)


def is_plain(metadata: Any) -> bool:
    """Whether a compiled kernel is launched with nothing but threads, shared memory and its parameters."""
    more = metadata.launch_cooperative_grid, metadata.launch_pdl, metadata.global_scratch_size
    return metadata.num_ctas == 1 and not any((*more, metadata.profile_scratch_size))


def _is_as_compiled(addresses: list[int | None], integers: tuple[int, ...]) -> bool:
    """Whether Triton would launch what it compiles for aligned pointers and 32-bit integers; the rest is rare."""
    return max(integers) <= _INT32_MAX and functools.reduce(operator.or_, filter(None, addresses)) % ALIGNMENT == 0


def _is_known(kernel: Any, device: torch.device) -> bool:
    """Whether it is a compiled kernel (not an interpreted one, say), of a Triton that is known to launch as above."""
    return device.type == "cuda" and _version_is_known and isinstance(kernel, JITFunction)


def is_profiled() -> bool:
    """Whether a profiler must hear of each launch, which it does by hooks that only Triton itself calls."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
