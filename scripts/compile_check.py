"""Compile every kernel variant in use for real GPUs, without one, and look at what came out.

Fails if a variant does not compile, spills registers, or moves activations in accesses narrower than alignment allows.
Run it as ``make compile-check``; ``--quick`` takes fewer dtypes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from brn_kernels.backends import reference
from brn_kernels.backends.triton import kernels_backward, kernels_forward, launch

KERNELS = {
    kernels_forward: ("stream_kernel", "repair_kernel"),
    kernels_backward: ("reduce_kernel", "apply_kernel", "alone_kernel"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# dtypes by architecture; fp16 compiles as bf16 does but for the conversions
CHECKED = dict.fromkeys((80, 90, 100), tuple(DTYPES))
CHECKED_QUICKLY = {80: ("bf16",), 90: ("bf16", "fp32", "fp64"), 100: ("bf16",)}
TRITON_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
FUSED = [(None, False), ("relu", True), ("relu", False), (None, True)]  # activation, residual
OTHER_ACTIVATIONS = [("leaky_relu", False), ("silu", False), ("hardswish", False)]
# What a caller may give or leave out; a dtype stands for a vector of it
HALF = torch.float16
NO_STATISTICS = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked", "clipped"))
OTHER_CALLS: dict[str, dict[str, Any]] = {
    "cumulative average": {"momentum": None},
    "limits as a tensor": {"limits": torch.empty(2, device="meta"), "num_batches_tracked": None, "clipped": None},
    "automatic limits": {"auto_state": torch.empty(5, 256, device="meta")},
    "no running statistics": NO_STATISTICS,
    "half parameters and statistics": dict.fromkeys(("weight", "bias", "running_mean", "running_var"), HALF),
    "no weight, no bias": {"weight": None, "bias": None},
}
# (N, C, H, W) and whether it is channels_last: what distinguishes launches is the tile, the vector and the splits
SHAPES = {
    "channels_last": ((256, 256, 56, 56), True),
    "channels_last, one launch": ((2, 1024, 7, 7), True),
    "channels_last, 24 channels": ((64, 24, 56, 56), True),
    "channels_last, 2^32 rows": ((2**15, 8, 256, 512), True),
    "contiguous 56x56": ((256, 64, 56, 56), False),
    "contiguous 28x28": ((256, 512, 28, 28), False),
    "contiguous 7x7": ((256, 2048, 7, 7), False),
}
BULK = {"x_ptr", "dy_ptr", "residual_ptr", "y_ptr", "dx_ptr", "dresidual_ptr"}  # what else is read is small
PTX_PARAMETER = re.compile(r"ld\.param\.b64\s+(%rd\d+), \[\w+?_param_(\d+)\]")
PTX_ARITHMETIC = re.compile(r"\s(?:@!?%p\d+ )?(?:add|sub|mov|selp|cvta|mad|shl)\S*\s+(%rd\d+), (.*);")
PTX_ACCESS = re.compile(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bus](\d+)\b.*?\[ (%rd\d+)")
PTX_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global .*?\], \[ (%rd\d+).*?\], (0x[0-9a-f]+|\d+)")
SASS_SPILL = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel with the types, constants and divisibilities of a launch."""

    kernel: str
    label: str = field(compare=False)
    vector_bytes: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


class Recorder:
    """Stands in for a kernel and notes how it is launched."""

    def __init__(self, kernel: Any, name: str, found: dict[Variant, None]) -> None:
        self.kernel, self.name, self.found = kernel, name, found
        self.label, self.itemsize = "", 0

    def __getitem__(self, grid: Any) -> Any:
        return self.record

    def record(self, *arguments: Any, **keywords: Any) -> None:
        """A launch."""
        options = {name: keywords.pop(name) for name in ("num_warps", "maxnreg") if name in keywords}
        constexprs = keywords
        signature, constants, divisible = {}, dict(constexprs), []
        for parameter, value in zip(self.kernel.params, arguments, strict=False):
            name = parameter.name
            if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TRITON_TYPES[value.dtype]
                divisible.append(name)
            elif isinstance(value, float):
                signature[name] = "fp64"
            else:
                signature[name] = "i64" if abs(value) >= 2**31 else "i32"
                divisible += [name] if value % 16 == 0 and not parameter.do_not_specialize else []
        for name in constants:
            signature[name] = "constexpr"
        variant = Variant(
            self.name, self.label, constexprs["VECTOR"] * self.itemsize,
            tuple((p.name, signature[p.name]) for p in self.kernel.params),
            tuple(sorted(constants.items(), key=lambda pair: pair[0])), tuple(divisible), tuple(options.items()),
        )  # fmt: skip
        self.found.setdefault(variant)


def variants(dtypes: tuple[str, ...]) -> list[Variant]:
    """Every distinct compilation that the library's own launch code asks for, over the shapes above."""
    found: dict[Variant, None] = {}
    recorders = []
    for module, names in KERNELS.items():
        for name in names:
            recorder = Recorder(getattr(module, name), name, found)
            setattr(module, name, recorder)
            recorders.append(recorder)
    for (shape_label, (shape, channels_last)), dtype_label in itertools.product(SHAPES.items(), dtypes):
        dtype = DTYPES[dtype_label]
        fused = FUSED if dtype_label in ("bf16", "fp32") else FUSED[:2]
        if "2^32" in shape_label:
            fused = FUSED[:1] if dtype_label == "bf16" else []
        if shape_label in ("channels_last", "contiguous 56x56") and dtype_label == "bf16":
            fused = fused + OTHER_ACTIVATIONS
        calls = [(f"{a or 'no activation'}{' + residual' if r else ''}", a, r, {}) for a, r in fused]
        if shape_label == "channels_last" and dtype_label == "bf16":
            calls += [(what, None, False, changes) for what, changes in OTHER_CALLS.items()]
        for what, activation, with_residual, changes in calls:
            for recorder in recorders:
                recorder.label = f"{shape_label}, {dtype_label}, {what}"
                recorder.itemsize = dtype.itemsize
            launch_once(shape, channels_last, dtype, activation, with_residual, changes)
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, getattr(module, name).kernel)
    return list(found)


def launch_once(
    shape: Any, channels_last: bool, dtype: torch.dtype, activation: str | None, residual: bool, changes: dict[str, Any]
) -> None:
    """A forward and backward of the library on tensors without memory."""
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
    y, saved, bits = launch.forward(x, **call)
    launch.backward(
        torch.empty_like(y), x, None, None, call["weight"], call["bias"], saved, bits, activation, True, residual
    )  # fmt: skip


def compile_variant(variant: Variant, architecture: int) -> list[Any]:
    """A row of the table; the last entry says what is wrong, if anything."""
    module = kernels_forward if variant.kernel in KERNELS[kernels_forward] else kernels_backward
    kernel = getattr(module, variant.kernel)
    position = {parameter.name: i for i, parameter in enumerate(kernel.params)}
    source = ASTSource(
        kernel, dict(variant.signature), {(position[n],): value for n, value in variant.constants},
        {(position[n],): [["tt.divisibility", 16]] for n in variant.divisible},
    )  # fmt: skip
    row = [f"sm_{architecture}", variant.kernel, variant.label]
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(variant.options))
    except Exception as error:  # whatever the compiler raises is the finding
        return [*row, "", "", "", "", f"does not compile: {str(error).splitlines()[0]}"]
    registers, stack, spills = resources(compiled.asm["cubin"])
    parameters = [name for name, kind in variant.signature if kind != "constexpr"]
    narrowest = narrowest_bulk_access(compiled.asm["ptx"], parameters)
    if narrowest == 0:
        return [*row, registers, compiled.metadata.shared, spills, "", "no access to activations found"]
    wanted = min(16, variant.vector_bytes)
    faults = []
    if spills or stack:
        faults.append(f"{spills} spills, {stack} bytes of stack")
    if narrowest < wanted:
        faults.append(f"accesses of {narrowest} bytes, {wanted} possible")
    return [*row, registers, compiled.metadata.shared, spills, f"{narrowest} of {wanted}", "; ".join(faults)]


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack, and instructions that touch local memory."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return int(fields["REG"]), int(fields["STACK"]), len(SASS_SPILL.findall(sass))


def narrowest_bulk_access(ptx: str, parameters: list[str]) -> int:
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


def main() -> int:
    """Print the table; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="bf16, and on sm_90 fp32 and fp64 too")
    parser.add_argument("--faults", action="store_true", help="print only rows with a fault, and the summary")
    arguments = parser.parse_args()
    checked = CHECKED_QUICKLY if arguments.quick else CHECKED
    jobs = [(variant, architecture) for architecture, dtypes in checked.items() for variant in variants(dtypes)]
    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache
        futures = [pool.submit(compile_variant, *job) for job in jobs]
        rows = [future.result() for future in tqdm(futures, unit="variant", mininterval=2)]
    headers = ["GPU", "kernel", "launch", "registers", "shared", "spills", "bytes", "fault"]
    print(tabulate([row for row in rows if row[-1] or not arguments.faults], headers, disable_numparse=True))
    faults = collections.Counter(bool(row[-1]) for row in rows)
    print(f"\n{len(rows)} compilations, {faults[True]} with a fault (triton {triton.__version__})")
    return 1 if faults[True] else 0


if __name__ == "__main__":
    sys.exit(main())
