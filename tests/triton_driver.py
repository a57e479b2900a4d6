"""Triton's kernels in C++ on machines without a GPU: what stands in for the CUDA driver interprets them."""

import contextlib
import ctypes
import threading
import types
from unittest import mock

import torch

from brn_kernels import node

LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)  # fmt: skip
IS_CAPTURING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
ERROR_STRING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
ONE_AT_A_TIME = threading.RLock()  # the interpreter is not made for several
CURRENT_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
DEVICE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int)
PRIMARY_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int)
SET_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
CURRENT_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
NUMBERS = {"i32": ctypes.c_int32, "fp64": ctypes.c_double}


def at(address, dtype):
    """A tensor there, of one element: the interpreter asks it for its address and dtype alone."""
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


class Compiled:
    """An interpreted kernel, as Triton's compiled ones look: with the signature that its first call had."""

    def __init__(self, function, interpret, interpreter, arguments, constants):
        self.function, self.packed_metadata = function, ("metadata",)
        self.metadata = types.SimpleNamespace(
            num_warps=constants["num_warps"], num_ctas=1, shared=64 * function, launch_cooperative_grid=False,
            launch_pdl=False, global_scratch_size=0, profile_scratch_size=0,
        )  # fmt: skip
        self.with_interpreter, self.interpreter, self.constants = interpret, interpreter, constants
        names = interpreter.arg_names
        self.dtypes = {name: t.dtype for name, t in zip(names, arguments, strict=False) if torch.is_tensor(t)}
        kinds = {int: "i32", float: "fp64", type(None): "constexpr"}
        self.src = types.SimpleNamespace(
            signature={n: kinds.get(type(a), "*memory") for n, a in zip(names, arguments, strict=False)}
            | {name: "constexpr" for name in names if name in constants}
        )

    def interpret(self, grid, values):
        """Run it; ``values`` are those of the parameters in turn that are not constants."""
        given = iter(values)
        arguments = []
        for name, kind in self.src.signature.items():
            if kind == "constexpr":
                arguments += [] if name in self.constants else [None]
            else:
                value = next(given)
                arguments.append(at(value, self.dtypes[name]) if name in self.dtypes else value)
        assert not list(given)
        with ONE_AT_A_TIME:
            self.with_interpreter(self.interpreter, *arguments, grid=grid, warmup=False, **self.constants)

    def run(self, *arguments):
        """As Triton's launcher is called."""
        x, y, _, stream, function, metadata, *nothing = arguments[:9]
        assert (function, metadata, nothing) == (self.function, self.packed_metadata, [None] * 3)
        count = len(self.src.signature) - len([name for name in self.src.signature if name in self.constants])
        self.interpret((x, y), [value for value in arguments[9 : 9 + count] if value is not None])


class StandIn:
    """The driver.

    ``launched``: (function, grid, threads, shared bytes, stream) of each launch in C++. ``contexts``: how often a
    thread was given the device's, without which it may launch nothing.
    """

    def __init__(self):
        self.compiled, self.launched, self.error, self.capturing, self.contexts = [], [], 0, 0, 0
        self.stream = 0x5
        self._current = threading.local()
        self._kept = (
            LAUNCH(self._launch), IS_CAPTURING(self._is_capturing), ERROR_STRING(self._error_string),
            CURRENT_CONTEXT(self._current_context), DEVICE(self._device), PRIMARY_CONTEXT(self._primary_context),
            SET_CONTEXT(self._set_context), CURRENT_STREAM(self._current_stream),
        )  # fmt: skip

    def addresses(self):
        return tuple(ctypes.cast(function, ctypes.c_void_p).value for function in self._kept)

    def _launch(self, function, gx, gy, gz, tx, ty, tz, shared, stream, parameters, extra):
        compiled = self.compiled[function - 1]
        self.launched.append((function, (gx, gy, gz), (tx, ty, tz), shared, stream))
        if self.error or not hasattr(self._current, "context"):
            return self.error or 201
        kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
        kinds += ["*scratch", "*scratch"]  # Triton appends them to every kernel's parameters
        values = [NUMBERS.get(kind, ctypes.c_uint64).from_address(parameters[i]).value for i, kind in enumerate(kinds)]
        assert values[-2:] == [0, 0] and not extra
        with torch.no_grad():
            compiled.interpret((gx, gy), values[:-2])
        return 0

    def _is_capturing(self, stream, status):
        status[0] = self.capturing
        return 0

    def _error_string(self, error, text):
        text[0] = b"as the driver says"
        return 0

    def _current_context(self, context):
        context[0] = getattr(self._current, "context", None)
        return 0

    def _device(self, device, index):
        device[0] = 10 + index
        return 0

    def _primary_context(self, context, device):
        context[0] = 100 + device
        return 0

    def _current_stream(self, device, stream):
        stream[0] = self.stream
        return 0

    def _set_context(self, context):
        self._current.context = context
        self.contexts += 1
        return 0


@contextlib.contextmanager
def standing_in():
    """Calls by the Triton backend are C++'s from the second on; yields the stand-in for the driver."""
    from triton.runtime.interpreter import InterpretedFunction

    from brn_kernels.backends.triton import launch, launcher

    driver = StandIn()
    interpret = InterpretedFunction.run

    def run(kernel, *arguments, grid, warmup, **constants):
        with ONE_AT_A_TIME:
            interpret(kernel, *arguments, grid=grid, warmup=warmup, **constants)
        compiled = Compiled(len(driver.compiled) + 1, interpret, kernel, arguments, constants)
        driver.compiled.append(compiled)
        return compiled

    with contextlib.ExitStack() as stack:
        launch.forget()
        stack.callback(launch.forget)
        for what, name, value in (
            (node, "_plans", {}), (launcher, "_is_known", lambda *_: True), (launcher, "driver", driver.addresses),
            (InterpretedFunction, "run", run),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(what, name, value))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True))
        node.forget()
        stack.callback(node.forget)
        yield driver
