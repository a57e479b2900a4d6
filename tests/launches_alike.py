"""Run by test_node_driver.py where libcuda.so.1 is the stand-in: launches by Triton and by C++, compared.

Kernels are compiled for sm_90; they are launched on the CPU's memory, which nothing reads.
"""

import contextlib
import ctypes
import itertools
from unittest import mock

import torch
import triton
from node_calls import asked, in_python, is_in_cpp, laid_out, made
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

import brn_kernels as brn
from brn_kernels import node
from brn_kernels.backends.triton import config, launch, launcher

LISTENER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, *[ctypes.c_uint] * 5, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
SIZES = {"i32": 4, "fp64": 8}
compiled, launched = [], []


class Driver(CudaDriver):
    """Triton's, of a GPU that is not there."""

    def __init__(self):
        super().__init__()
        self.utils.load_binary = self._load
        self.utils.get_device_properties = lambda _: {"max_shared_mem": 232448}
        self.get_current_device, self.get_current_stream, self.set_current_device = (lambda *_: 0,) * 3

    def get_current_target(self):
        """An H100."""
        return GPUTarget("cuda", 90, 32)

    def _load(self, *_):
        compiled.append(None)
        return 1, len(compiled), 64, 0, 1024  # module, function, registers, spills, threads at most


@LISTENER
def listener(function, x, y, z, threads, shared_bytes, stream, parameters):
    """Notes a launch: all but addresses by its bytes, of addresses whether there is one."""
    if compiled[function - 1] is None:  # its first launch, by Triton's own way, which is not compared
        return 0
    kinds = [kind for kind in compiled[function - 1].src.signature.values() if kind != "constexpr"]
    values = []
    for i, kind in enumerate([*kinds, "*scratch", "*scratch"]):
        value = ctypes.string_at(parameters[i], SIZES.get(kind, 8))
        values.append(any(value) if kind.startswith("*") and value not in given else value)
    launched.append((function, x, y, z, threads, shared_bytes, stream, tuple(values)))
    return 0


given = set()  # the addresses that are the same by both ways


def main():
    """Compare; raises where they differ."""
    triton_driver.set_active(Driver())
    ctypes.CDLL("libcuda.so.1").listen_to_launches(listener)
    fused = ((False, None), (True, "relu"))
    cases = list(itertools.product(("contiguous", "channels_last"), (torch.float32, torch.bfloat16), fused))
    with contextlib.ExitStack() as stack:
        for what, name, value in (
            (launcher, "_is_known", lambda *_: True), (config, "multiprocessors_of", lambda _: 7),
            (launch, "tickets", lambda *_: COUNTERS), (node, "_plans", {}), (launcher, "_TORCH_CUDA", "libcuda.so.1"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(what, name, value))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True))
        run = JITFunction.run

        def known(kernel, *arguments, **keywords):
            made = run(kernel, *arguments, **keywords)
            compiled[made.function - 1] = made
            return made

        stack.enter_context(mock.patch.object(JITFunction, "run", known))
        numbers = [compare(*case) for case in cases]
        for name, value in TINY_TILES.items():
            stack.enter_context(mock.patch.object(config, name, value))
        numbers += [compare(*case) for case in cases]
    assert set(numbers) == {2, 4}, numbers


COUNTERS = torch.zeros(4096, dtype=torch.int32)
TINY_TILES = {
    "SETTINGS": dict.fromkeys(config.SETTINGS, config.Settings(1, 1, 3)), "MAX_INNER_CHANNELS_LAST": 8,
    "MIN_INNER_CONTIGUOUS": 8, "ITEMS_WITHOUT_SPLIT": 0, "_resident": lambda *_: None,
}  # fmt: skip


def compare(layout, dtype, fused):
    """The launches of a step, of one kind of call: how many."""
    residual, activation = fused
    launch.forget()
    node.forget()
    launched.clear()
    layer, x, extra, dy = made(dtype, layout, residual, activation, affine=residual)
    layer.momentum, layer.schedule = 0.25, brn.ClipSchedule(2.5, 3.5, hold=7, r_ramp=11, d_ramp=13)
    dy = laid_out(dy, layout)
    tensors = [x, extra, dy, *layer.parameters(), *layer.buffers(), COUNTERS]
    given.clear()
    given.update(t.data_ptr().to_bytes(8, "little") for t in tensors if t is not None)

    def step():
        launched.clear()
        y = layer(x, extra)
        torch.autograd.grad(y, asked(x, extra, *layer.parameters()), dy)
        return is_in_cpp(y), list(launched)

    with in_python():
        step()  # compiles
        _, by_triton = step()
    was_in_cpp, by_cpp = step()
    assert was_in_cpp and by_cpp == by_triton, (by_cpp, by_triton)
    return len(by_cpp)


if __name__ == "__main__":
    with brn.use_backend("auto"), mock.patch("brn_kernels.backends._resolve", lambda *_: brn.backends.triton):
        main()
    print(f"triton {triton.__version__}: alike")
