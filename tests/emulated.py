"""The CUDA kernels as a CPU runs them (csrc/emulation): compiled, loaded, steered."""

import contextlib
import ctypes
import functools

import torch

from brn_kernels.build import BuildError, cache_directory, place, recipe, tools

HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)
OUT_OF_MEMORY, NO_KERNEL_IMAGE = 2, 209  # cudaErrorMemoryAllocation, cudaErrorNoKernelImageForDevice


class Emulation:
    """The loaded library."""

    def __init__(self, path):
        torch.ops.load_library(path)
        self.loaded = ctypes.CDLL(str(path))

    @property
    def operators(self):
        return torch.ops.brn_kernels_emulated

    def set_multiprocessors(self, count):
        """Of the GPU that is played: into how many blocks a call is cut."""
        self.loaded.emulation_set_multiprocessors(count)

    def last_error(self):
        """What the next ``cudaGetLastError`` would return."""
        return self.loaded.emulation_last_error()

    @contextlib.contextmanager
    def before(self, hook):
        """``hook(call)`` before each call of the runtime and each block: what it returns, if anything, is the error."""
        called = HOOK(lambda call: hook(call.decode()) or 0)
        self.loaded.emulation_set_hook(called)
        try:
            yield
        finally:
            self.loaded.emulation_set_hook(None)


@functools.cache
def load():
    """The emulation; or, in a string, why there is none. Compiled once for all processes."""
    try:
        kit = tools.gather(cuda=False)
    except BuildError as error:
        return f"nothing to compile with: {error}"
    manifest = recipe.manifest("emulated", [], False, kit)
    place.ensure(cache_directory(), [manifest], kit, say=print)
    return Emulation(cache_directory() / recipe.file_name(manifest))
