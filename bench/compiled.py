"""What a layer launches, and what comes out of the compiler for it: without a GPU, on tensors without memory."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from brn_kernels.backends import reference
from brn_kernels.backends.triton import kernels_backward, kernels_forward, launch, launcher
from brn_kernels.backends.triton.kernels_common import SIZES

KERNELS = {
    kernels_forward: ("stream_kernel", "repair_kernel", "resident_forward_kernel"),
    kernels_backward: ("reduce_kernel", "apply_kernel", "alone_kernel", "resident_backward_kernel"),
}
TRITON_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
BULK = {"x_ptr", "dy_ptr", "residual_ptr", "y_ptr", "dx_ptr", "dresidual_ptr"}  # what else is read is small
PTX_TYPES = {"*": "u64", "i32": "u32", "fp64": "f64"}
PTX_DECLARATION = re.compile(r"^\s*\.param \.(\w+)", re.MULTILINE)
PTX_PARAMETER = re.compile(r"ld\.param\.b64\s+(%rd\d+), \[\w+?_param_(\d+)\]")
PTX_ARITHMETIC = re.compile(r"\s(?:@!?%p\d+ )?(?:add|sub|mov|selp|cvta|mad|shl)\S*\s+(%rd\d+), (.*);")
PTX_ACCESS = re.compile(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bus](\d+)\b.*?\[ (%rd\d+)")
PTX_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global .*?\], \[ (%rd\d+).*?\], (0x[0-9a-f]+|\d+)")
SASS_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
SASS_JUMP = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
SASS_SPILL = re.compile(r"\b(LDL|STL)\b")
SASS_READ = re.compile(r"\bLDG(STS)?\b")
SASS_BARRIER = re.compile(r"\bBAR\b")
SASS_EXIT = re.compile(r"EXIT\b")  # whatever the predicates say


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel with the types, constants and divisibilities of a launch."""

    kernel: str
    vector_bytes: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Launched:
    """A launch: its compilation, programs, and the numbers it is given."""

    variant: Variant
    grid: tuple[int, ...]
    numbers: dict[str, Any]  # sizes, strides and constants, by name
    tensors: frozenset[str]  # the pointers that are given


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant."""

    registers: int
    stack: int  # bytes
    spills: int  # instructions that touch local memory
    waits: int  # barriers in a loop that reads memory, at most: threads exchange what each of them could have
    instructions: int  # of the longest such loop: that over items
    shared: int  # bytes
    narrowest: int  # bytes of the narrowest access to activations; 0: none was found
    unlike_driver: str  # in what it differs from what ``csrc/autograd/triton.cpp`` launches


class _Recorder:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel: Any, name: str, found: list[Launched]) -> None:
        self.kernel, self.name, self.found, self.arg_names = kernel, name, found, kernel.arg_names
        self.grid: tuple[int, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid
        return self.record

    def record(self, *arguments: Any, **keywords: Any) -> None:
        """A launch."""
        options = {name: keywords.pop(name) for name in ("num_warps", "maxnreg") if name in keywords}
        signature, constants, divisible, numbers, tensors = {}, dict(keywords), [], dict(keywords), {}
        for name, value in zip(self.kernel.arg_names, arguments, strict=False):
            specialized = name not in SIZES
            if value is None or (isinstance(value, int) and value == 1 and specialized):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TRITON_TYPES[value.dtype]
                divisible.append(name)
                tensors[name] = value
                continue
            elif isinstance(value, float):
                signature[name] = "fp64"
            else:
                signature[name] = "i64" if abs(value) >= 2**31 else "i32"
                divisible += [name] if value % 16 == 0 and specialized else []
            numbers[name] = value
        for name in constants:
            signature[name] = "constexpr"
        itemsize = next(t.dtype.itemsize for name, t in tensors.items() if name in BULK)
        variant = Variant(
            self.name, keywords["VECTOR"] * itemsize, tuple((name, signature[name]) for name in self.kernel.arg_names),
            tuple(sorted(constants.items(), key=lambda pair: pair[0])), tuple(divisible), tuple(options.items()),
        )  # fmt: skip
        numbers |= options | {"itemsize": itemsize}
        self.found.append(Launched(variant, self.grid, numbers, frozenset(tensors)))


@contextmanager
def _recorded(found: list[Launched]) -> Iterator[None]:
    kernels = [(module, name, getattr(module, name)) for module, names in KERNELS.items() for name in names]
    for module, name, kernel in kernels:
        setattr(module, name, _Recorder(kernel, name, found))
    try:
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def launches(
    shape: tuple[int, ...],
    channels_last: bool,
    dtype: torch.dtype,
    activation: str | None,
    residual: bool,
    **changes: Any,
) -> list[Launched]:
    """What a forward and a backward of a layer launch, in their order.

    Args:
        shape: of x.
        channels_last: the layout of x.
        dtype: of x.
        activation: that follows, or None.
        residual: whether one is added before it.
        changes: arguments of the backend's forward; a dtype stands for a vector of it.
    """
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    acc, channels = reference.statistics_dtype(x), shape[1]

    def vector(kind: torch.dtype) -> torch.Tensor:
        return torch.empty(channels, dtype=kind, device="meta")

    call: dict[str, Any] = {
        "residual": torch.empty_like(x) if residual else None, "mask": None,
        "weight": vector(acc), "bias": vector(acc), "running_mean": vector(acc), "running_var": vector(acc),
        "num_batches_tracked": torch.empty((), dtype=torch.int64, device="meta"), "clipped": vector(torch.bool),
        "limits": None, "schedule": [3.0, 5.0, 5000.0, 35000.0, 20000.0], "momentum": 0.01, "eps": 1e-5,
        "activation": activation,
    }  # fmt: skip
    call |= {name: vector(value) if isinstance(value, torch.dtype) else value for name, value in changes.items()}
    found: list[Launched] = []
    with _recorded(found):
        y, saved, bits = launch.forward(x, **call)
        if residual and activation is not None and bits is None:  # a trace gates dy itself
            activation, residual = None, False
        launch.backward(
            torch.empty_like(y), x, None, None, call["weight"], call["bias"], saved, bits, activation, True, residual
        )  # fmt: skip
    return found


def compile_variant(variant: Variant, architecture: int) -> Compiled:
    """Compile for sm_``architecture``; raises whatever the compiler raises."""
    os.environ.pop("TRITON_INTERPRET", None)
    module = next(module for module, names in KERNELS.items() if variant.kernel in names)
    kernel = getattr(module, variant.kernel)
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel, dict(variant.signature), {(position[n],): value for n, value in variant.constants},
        {(position[n],): [["tt.divisibility", 16]] for n in variant.divisible},
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(variant.options))
    parameters = [name for name, kind in variant.signature if kind != "constexpr"]
    return Compiled(
        *_resources(compiled.asm["cubin"]), compiled.metadata.shared,
        _narrowest_bulk_access(compiled.asm["ptx"], parameters), _unlike_driver(compiled),
    )  # fmt: skip


def _unlike_driver(compiled: Any) -> str:
    kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    if "i64" in kinds:
        return ""  # sizes of more than 32 bits: Triton launches it
    expected = [PTX_TYPES.get(kind[0] if kind[0] == "*" else kind) for kind in kinds] + ["u64", "u64"]
    if (found := PTX_DECLARATION.findall(compiled.asm["ptx"])) != expected:
        return f"parameters {found} for {kinds}"
    metadata = compiled.metadata
    if f".reqntid {32 * metadata.num_warps}" not in compiled.asm["ptx"]:
        return "another number of threads"
    return "" if launcher.is_plain(metadata) else "asks for more than threads and shared memory"


def _resources(cubin: bytes) -> tuple[int, int, int, int, int]:
    """Registers, bytes of stack, instructions that touch local memory, barriers in a loop, instructions of a loop."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    loops = loops_that_read(sass)
    waits, longest = max(map(barriers, loops), default=0), max(map(len, loops), default=0)
    return int(fields["REG"]), int(fields["STACK"]), len(SASS_SPILL.findall(sass)), waits, longest


def barriers(loop: list[str]) -> int:
    """How often a loop's threads wait for each other."""
    return sum(bool(SASS_BARRIER.search(instruction)) for instruction in loop)


def loops_that_read(sass: str) -> list[list[str]]:
    """The instructions of each loop of a kernel that reads global memory.

    A loop ends where it jumps back, and the kernel does not end in it: behind the end lie pieces that are seldom run,
    and jump back too.
    """
    instructions = [(int(at, 16), what) for at, what in SASS_INSTRUCTION.findall(sass)]
    found = []
    for end, what in instructions:
        jump = SASS_JUMP.search(what)
        if jump and (start := int(jump[1], 16)) < end:
            loop = [inside for at, inside in instructions if start <= at <= end]
            if any(map(SASS_READ.search, loop)) and not any(map(SASS_EXIT.match, loop)):
                found.append(loop)
    return found


def _narrowest_bulk_access(ptx: str, parameters: list[str]) -> int:
    """Bytes of the narrowest access that moves activations: whose address comes from one of their pointers."""
    origin: dict[str, str] = {}  # of a 64-bit register: the pointer it was computed from
    for line in ptx.splitlines() * 2:  # twice, for what a loop carries back
        if match := PTX_PARAMETER.search(line):
            name = parameters[int(match[2])] if int(match[2]) < len(parameters) else ""
            if name.endswith("_ptr"):
                origin[match[1]] = name
        elif match := PTX_ARITHMETIC.match(line):
            for source in re.findall(r"%rd\d+", match[2]):
                if source in origin:
                    origin[match[1]] = origin[source]
    widths = []
    for line in ptx.splitlines():
        if (match := PTX_ACCESS.search(line)) and origin.get(match[3]) in BULK:
            widths.append(int(match[1] or 1) * int(match[2]) // 8)
        if (match := PTX_ASYNC_COPY.search(line)) and origin.get(match[1]) in BULK:
            widths.append(int(match[2], 0))
    return min(widths, default=0)
