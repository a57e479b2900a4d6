"""What a call costs the host where kernels take no time: on a device that computes nothing (``idle_device.cpp``).

Needs no GPU, but a C++ compiler. The host's code is the one that runs on a GPU: the layer's, autograd's (whose backward
runs in another thread) and that which launches Triton kernels, up to the driver's call, or in Python that of Triton's
launcher.
"""

from __future__ import annotations

import contextlib
import csv
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

import brn_kernels as brn
from brn_kernels import backends, node
from brn_kernels.backends import triton as kernels
from brn_kernels.backends.in_cpp import DRIVER_FUNCTIONS
from brn_kernels.backends.triton import launch, launcher

from .record import machine

SHAPE = (2, 64, 2, 2)
NAME = "idle"  # of the device
IN_PYTHON = "brn_kernels, in Python"
CALLS = 100  # one after the other, before it is another's turn
COLUMNS = ("what", "direction", "p20_us", "p50_us")


def run(out: Path, seconds: float) -> Path:
    """Measure a small layer, in C++ and in Python, and BatchNorm in turns.

    The CSV says microseconds of a call. Without ``csrc/autograd`` (``brn build``) all of ours are in Python.

    Args:
        out: the CSV. ``direction``: "forward"; "backward" of one graph again and again; "both": of a new graph.
        seconds: in all, beside building the device.

    Raises:
        ValueError: there is a GPU, where ``brn bench`` measures this; or the device cannot be built.
    """
    if torch.cuda.is_available():
        raise ValueError("there is a GPU here, on which `brn bench` measures the host's time")
    device = _device()
    about = machine(torch.device("cpu"))
    del about["calls"]  # both are measured
    out.parent.mkdir(parents=True, exist_ok=True)
    with _launching_nothing(device), out.open("w", newline="") as file:
        layers = {"BatchNorm": _moved(nn.BatchNorm2d(SHAPE[1]), device)}
        layers |= {what: _moved(brn.BatchRenorm2d(SHAPE[1]), device) for what in (IN_PYTHON, "brn_kernels")}
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for what, layer in layers.items():
            with _place(what):
                calls |= {(what, name): call for name, call in _calls(layer, device)}
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *about])
        for label, times in _in_turns(calls, seconds).items():
            tenths = statistics.quantiles(times, n=10)
            writer.writerow([*label, f"{1e6 * tenths[1]:.1f}", f"{1e6 * tenths[4]:.1f}", *about.values()])
    return out


def _in_turns(calls: dict[tuple[str, str], Callable[[], object]], seconds: float) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {label: [] for label in calls}
    until = time.monotonic() + seconds
    while time.monotonic() < until or not all(found.values()):
        for label, call in calls.items():
            with _place(label[0]):
                for done in range(-CALLS // 10, CALLS):
                    started = time.perf_counter()
                    call()
                    if done >= 0:  # the first ones warm up
                        found[label].append(time.perf_counter() - started)
    # The backwards' thread drops its hold of the last gradients after `call` has returned. Python must not end
    # meanwhile, or PyTorch ends the process (BatchNorm's backward, too).
    time.sleep(0.1)
    return found


def _place(what: str) -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(node, "module", lambda: None) if what == IN_PYTHON else contextlib.nullcontext()


def _calls(layer: nn.Module, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    x, dy = torch.empty(SHAPE, device=device, requires_grad=True), torch.empty(SHAPE, device=device)
    inputs = [x, *layer.parameters()]
    torch.autograd.grad(layer(x), inputs, dy)  # what C++ launches was launched before
    y = layer(x)
    yield "forward", lambda: layer(x)
    yield "backward", lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)
    yield "both", lambda: torch.autograd.grad(layer(x), inputs, dy)


def _device() -> torch.device:
    """Build and register it."""
    source = Path(__file__).with_name("idle_device.cpp")
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja may be
    try:
        with mock.patch.dict(os.environ, PATH=beside_python):
            cpp_extension.load("brn_idle_device", [str(source)], extra_cflags=["-O1"], is_python_module=False)
    except RuntimeError as error:
        raise ValueError(f"the device cannot be built, which needs a C++ compiler and ninja: {error}") from error
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = types.ModuleType(NAME)
    module.is_available, module.is_initialized, module._is_in_bad_fork = (lambda: True), (lambda: True), (lambda: False)
    module.current_device, module.device_count = (lambda: 0), (lambda: 1)
    torch._register_device_module(NAME, module)
    return torch.device(NAME, 0)


def _moved(layer: nn.Module, device: torch.device) -> nn.Module:
    """With parameters and buffers of the same kinds there, of whatever values."""
    for name, parameter in layer._parameters.items():
        assert parameter is not None
        layer._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            layer._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return layer


class _Nothing:
    """Stands in for a kernel, and for what Triton makes of it."""

    function, packed_metadata = 0, None
    metadata = types.SimpleNamespace(
        num_warps=4, num_ctas=1, shared=0, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
        profile_scratch_size=0,
    )  # fmt: skip

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names
        self.src = types.SimpleNamespace(signature={})

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., _Nothing]:
        return self._compiled

    def _compiled(self, *arguments: object, **constants: object) -> _Nothing:
        kinds = {int: "i32", float: "fp64", type(None): "constexpr"}
        given = zip(self.arg_names, arguments, strict=False)
        self.src.signature = {name: kinds.get(type(value), "*") for name, value in given}
        return self

    def run(self, *_: object) -> None:
        """A launch."""


@contextlib.contextmanager
def _launching_nothing(device: torch.device) -> Iterator[None]:
    counters: Tensor = torch.empty(1, dtype=torch.int32, device=device)
    called = ("cuLaunchKernel", "cuStreamIsCapturing", "cuCtxGetCurrent", "aoti_torch_get_current_cuda_stream")
    driver = tuple(getattr(torch.ops.brn_idle, name)() if name in called else 0 for name in DRIVER_FUNCTIONS)
    with contextlib.ExitStack() as stack:
        for module, name in (
            (launch.kernels_forward, "stream_kernel"), (launch.kernels_forward, "resident_forward_kernel"),
            (launch.kernels_forward, "repair_kernel"), (launch.kernels_backward, "reduce_kernel"),
            (launch.kernels_backward, "apply_kernel"), (launch.kernels_backward, "alone_kernel"),
            (launch.kernels_backward, "resident_backward_kernel"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, _Nothing(getattr(module, name))))
        stack.enter_context(mock.patch.object(launcher, "_is_known", lambda *_: True))
        stack.enter_context(mock.patch.object(launcher, "driver", lambda: driver))
        stack.enter_context(mock.patch.object(launch, "tickets", lambda *_: counters))
        stack.enter_context(mock.patch.object(backends, "_resolve", lambda *_: kernels))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True))
        yield
