"""How long the Triton kernels should take: a model of a GPU's memory, to choose settings by where there is no GPU.

A program goes through its items one by one. Each takes as long as memory answers (``latency``), or as long as its share
of the bandwidth lasts: whichever is longer. Programs run in rounds of as many as find room. To that come what a program
does before and after its items, merging partial results, and launches. Bytes, programs and items come from the
library's own launch code; registers and shared memory, which say how many programs find room, from the compiler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from .cases import DTYPES, Case
from .compiled import Compiled, Launched, compile_variant, launches

WARPS, PROGRAMS, REGISTERS, SHARED = 64, 32, 65536, 233472  # that find room on a multiprocessor: sm_80, sm_90, sm_100
FORWARD = ("stream_kernel", "repair_kernel", "resident_forward_kernel")
SHARED_OF_SYSTEM = 1024  # bytes a program


@dataclass(frozen=True)
class Constants:
    """Fitted to what was measured on a GPU (``docs/kernels.md`` says how well they fit). Seconds, unless said."""

    launch: float  # of a call's first kernel, empty
    next_launch: float  # of one behind it
    program: float  # before its first item and after its last
    item: float  # of a program, however few there are: the latency of memory
    finish: float  # of a forward: what follows from a channel's statistics
    trip: float  # to L2 for partial results
    reading: float  # bandwidth where all is read, of a copy's
    mixing: float  # where some is written
    kept: float  # share of L2 in which the last bytes read are found again


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU."""

    architecture: int
    multiprocessors: int
    copy: float  # bytes/s, read and written, of a large copy
    l2: float  # bytes
    constants: Constants


H100 = Constants(
    launch=2.9e-6, next_launch=3.4e-6, program=1.1e-6, item=0.6e-6, finish=3.2e-6, trip=0.65e-6, reading=1.0,
    mixing=0.92, kept=0.27,
)  # fmt: skip
H200 = Constants(
    launch=3.4e-6, next_launch=5.3e-6, program=0.5e-6, item=0.55e-6, finish=2.0e-6, trip=1.4e-6, reading=1.04,
    mixing=0.91, kept=0.17,
)  # fmt: skip
GPUS = {  # copies: of the runs in bench/results that the constants were fitted to
    "h100": Gpu(90, 132, copy=3.02e12, l2=50e6, constants=H100),  # nvidia-h100-80gb-hbm3-quick-6ac4c85.csv
    "h200": Gpu(90, 132, copy=4.25e12, l2=50e6, constants=H200),  # nvidia-h200-quick-94ce2e3.csv
}


@dataclass(frozen=True)
class Walk:
    """One way through a kernel's items: tensors read and written, in passes."""

    read: float
    written: float
    again: bool = False  # what it reads was read before, most recently what it reads first


@dataclass(frozen=True)
class Kernel:
    """A launch and what the model says of it."""

    name: str
    registers: int
    spills: int  # instructions that touch local memory
    shared: int  # bytes
    programs: int
    resident: int  # programs on a multiprocessor at once
    in_flight: int  # bytes asked for at once, of a multiprocessor
    read: float  # bytes, of activations
    written: float
    seconds: float


def walks(launched: Launched, state: str) -> list[Walk]:
    """What a kernel does with activations where all channels are in one state: "open" (nothing clips) or "closed"."""
    name, tensors = launched.variant.kernel, launched.tensors
    bits = 1 / (8 * launched.numbers["itemsize"]) if "bits_ptr" in tensors else 0.0
    if name in FORWARD:
        writing = (1.0 + ("residual_ptr" in tensors), 1.0 + bits)
        if name == "repair_kernel":
            return [] if state == "open" else [Walk(*writing, again=True)]
        if name == "resident_forward_kernel":
            return [Walk(*writing)]
        found = [Walk(*writing) if state == "open" else Walk(1.0, 0.0)]
        if launched.numbers["ALONE"] and state == "closed":
            found.append(Walk(*writing, again=True))
        return found
    targets = len(tensors & {"dx_ptr", "dresidual_ptr"})
    reduce, apply = Walk(2.0 + bits, 0.0), Walk(2.0 + bits, float(targets), again=True)
    at_once = Walk(2.0 + bits, float(targets))
    return {
        "reduce_kernel": [reduce], "apply_kernel": [apply], "alone_kernel": [reduce, apply],
        "resident_backward_kernel": [at_once],
    }[name]  # fmt: skip


def resident(launched: Launched, compiled: Compiled) -> int:
    """Programs that find room on a multiprocessor."""
    warps = launched.numbers["num_warps"]
    registers = math.ceil(32 * compiled.registers / 256) * 256  # a warp's
    return min(
        WARPS // warps, PROGRAMS, REGISTERS // (registers * warps), SHARED // (compiled.shared + SHARED_OF_SYSTEM)
    )


def trips(launched: Launched) -> int:
    """By which partial results are merged, one after another; a bundle's counter is one too."""
    if launched.variant.kernel not in ("stream_kernel", "reduce_kernel") or launched.numbers.get("ALONE"):
        return 0
    rows, bundle = launched.numbers["MERGE_ROWS"], launched.numbers["bundle"]
    bundles = math.ceil(launched.grid[1] / bundle)
    return math.ceil(bundle / rows) + (1 + math.ceil(bundles / rows) if bundles > 1 else 0)


def kernel(
    launched: Launched,
    compiled: Compiled,
    pass_bytes: float,
    state: str,
    gpu: Gpu,
    is_first: bool,
) -> Kernel:
    """Predict a launch.

    Args:
        launched: its programs, and what each does.
        compiled: what it needs.
        pass_bytes: of an activation tensor.
        state: "open" or "closed".
        gpu: where it runs.
        is_first: of its call.
    """
    numbers, k = launched.numbers, gpu.constants
    programs, room = math.prod(launched.grid), resident(launched, compiled)
    needs = compiled.registers, compiled.spills, compiled.shared
    slots = room * gpu.multiprocessors
    tile_bytes = pass_bytes / (launched.grid[0] * numbers["items"])  # without what lies beyond the tensor
    steps = walks(launched, state)
    known = k.kept * gpu.l2
    seconds = k.launch if is_first else k.next_launch
    read = written = 0.0
    if not steps:
        return Kernel(launched.variant.kernel, *needs, programs, room, 0, 0, 0, seconds)
    finish = k.finish if launched.variant.kernel in FORWARD else 0.0
    by_itself = numbers.get("ALONE") or launched.variant.kernel == "resident_forward_kernel"
    for count, rounds in _rounds(programs, slots):
        seconds += rounds * (k.program + (finish if by_itself else 0.0))
        for walk in steps:
            moved = _from_memory(walk, programs, launched, pass_bytes, slots, known)
            share = tile_bytes * moved * count / (gpu.copy * (k.reading if walk.written == 0 else k.mixing))
            seconds += rounds * math.ceil(numbers["items"] / launched.grid[1]) * max(k.item, share)
    for walk in steps:
        moved = _from_memory(walk, programs, launched, pass_bytes, slots, known)
        read += pass_bytes * (moved - walk.written)
        written += pass_bytes * walk.written
    seconds += k.trip * trips(launched) + (finish if trips(launched) else 0.0)
    at_once = 1.0 if launched.variant.kernel == "stream_kernel" else steps[0].read  # the former asks for x ahead
    tile = numbers["OUTER"] * numbers["INNER"] * numbers["itemsize"]
    return Kernel(
        launched.variant.kernel, *needs, programs, room,
        round(at_once * tile * min(room, math.ceil(programs / gpu.multiprocessors))), read, written, seconds,
    )  # fmt: skip


def _rounds(programs: int, slots: int) -> Iterator[tuple[int, float]]:
    """How many programs run at once, and for how many rounds."""
    if programs >= slots:
        yield slots, programs // slots
    if programs % slots:
        yield programs % slots, 1


def _from_memory(walk: Walk, programs: int, launched: Launched, pass_bytes: float, slots: int, known: float) -> float:
    """Passes that a walk moves from or to memory; what was read a moment ago is found in L2."""
    if not walk.again:
        return walk.read + walk.written
    before = walk.read * pass_bytes
    if launched.variant.kernel in ("stream_kernel", "alone_kernel"):
        before *= min(slots, programs) / programs  # of the programs that run at once
    return walk.written + walk.read * (1 - min(1.0, known / before))


def predict(case: Case, direction: str, gpu: Gpu) -> list[Kernel]:
    """The kernels of a layer's forward or backward, in their order; "open" and "closed" limits.

    Raises:
        ValueError: another state, or direction.
    """
    if case.state not in ("open", "closed") or direction not in ("forward", "backward"):
        raise ValueError(f"there is no model of {case.state}, {direction}")
    layer = case.layer
    chosen = [
        launched
        for launched in launches(
            layer.shape, case.layout == "channels_last", DTYPES[case.dtype], layer.activation, layer.adds
        )
        if (launched.variant.kernel in FORWARD) == (direction == "forward")
    ]
    return [
        kernel(launched, _compiled(launched.variant, gpu.architecture), case.bytes, case.state, gpu, number == 0)
        for number, launched in enumerate(chosen)
    ]


_compiled = functools.lru_cache(maxsize=None)(compile_variant)
