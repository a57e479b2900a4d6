"""Compile every kernel variant in use for real GPUs, without one, and look at what came out.

Fails if a variant does not compile, spills registers, moves activations in accesses narrower than alignment allows,
waits at a barrier in a loop, or has other parameters than C++ passes (``csrc/autograd/triton.cpp``).
In the table, "loop" is the number of instructions of the longest loop that reads memory. Run it as
``make compile-check``; ``--quick`` takes fewer dtypes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import os
import sys
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from tabulate import tabulate
from tqdm import tqdm

from bench.compiled import Variant, compile_variant, launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# dtypes by architecture; fp16 compiles as bf16 does but for the conversions
CHECKED = dict.fromkeys((80, 90, 100), tuple(DTYPES))
CHECKED_QUICKLY = {80: ("bf16",), 90: ("bf16", "fp32", "fp64"), 100: ("bf16",)}
FUSED = [(None, False), ("relu", True), ("relu", False), (None, True)]  # activation, residual
FUSED_NARROW = [(None, False), ("relu", True)]  # where accesses are, whatever is computed
OTHER_ACTIVATIONS = [("leaky_relu", False), ("silu", False), ("hardswish", False)]
# Instructions that may touch local memory where half precision's bits are packed: with triton 3.7.1 a loop of 550
# fetches two invariants back, or five in one launch, where it repairs too. By architecture, kernel, and whether ALONE
TOLERATED_SPILLS = {(100, "stream_kernel", False): 7, (100, "stream_kernel", True): 16}
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
    "contiguous 14x14": ((256, 1024, 14, 14), False),
    "contiguous 7x7": ((256, 2048, 7, 7), False),
    "contiguous 33x33, one launch": ((8, 1024, 33, 33), False),
}


def variants(dtypes: tuple[str, ...]) -> dict[Variant, str]:
    """Every distinct compilation that the library's own launch code asks for, over the shapes above, and for what."""
    found: dict[Variant, str] = {}
    for (shape_label, (shape, channels_last)), dtype_label in itertools.product(SHAPES.items(), dtypes):
        dtype = DTYPES[dtype_label]
        fused = FUSED if dtype_label in ("bf16", "fp32") else FUSED[:2]
        if "33x33" in shape_label:
            fused = FUSED_NARROW if dtype_label in ("bf16", "fp32") else []
        if "2^32" in shape_label:
            fused = FUSED[:1] if dtype_label == "bf16" else []
        if shape_label in ("channels_last", "contiguous 56x56") and dtype_label == "bf16":
            fused = fused + OTHER_ACTIVATIONS
        calls = [(f"{a or 'no activation'}{' + residual' if r else ''}", a, r, {}) for a, r in fused]
        if ("relu", True) in fused:
            calls.append(("relu + residual, in a trace", "relu", True, {"wants_bits": False}))
        if shape_label == "channels_last" and dtype_label == "bf16":
            calls += [(what, None, False, changes) for what, changes in OTHER_CALLS.items()]
        for what, activation, with_residual, changes in calls:
            for launched in launches(shape, channels_last, dtype, activation, with_residual, **changes):
                found.setdefault(launched.variant, f"{shape_label}, {dtype_label}, {what}")
    return found


def row(variant: Variant, label: str, architecture: int) -> list[Any]:
    """A row of the table; the last entry says what is wrong, if anything."""
    about = [f"sm_{architecture}", variant.kernel, label]
    try:
        found = compile_variant(variant, architecture)
    except Exception as error:  # whatever the compiler raises is the finding
        return [*about, "", "", "", "", "", f"does not compile: {str(error).splitlines()[0]}"]
    wanted = min(16, variant.vector_bytes)
    faults = []
    types = dict(variant.signature)
    alone = dict(variant.constants).get("ALONE", False)
    packs_half = types["bits_ptr"] != "constexpr" and types["x_ptr"] in ("*bf16", "*fp16")
    tolerated = TOLERATED_SPILLS.get((architecture, variant.kernel, alone), 0) if packs_half else 0
    if found.spills > tolerated or (found.stack and not tolerated):
        faults.append(f"{found.spills} spills, {found.stack} bytes of stack")
    if found.narrowest == 0:
        faults.append("no access to activations found")
    elif found.narrowest < wanted:
        faults.append(f"accesses of {found.narrowest} bytes, {wanted} possible")
    if found.waits and types["x_ptr"] != "*fp64":  # float64 is not made for speed
        faults.append(f"{found.waits} barriers in a loop")
    if found.unlike_driver:
        faults.append(f"C++ cannot launch it: {found.unlike_driver}")
    width = f"{found.narrowest} of {wanted}"
    return [*about, found.registers, found.shared, found.spills, found.instructions, width, "; ".join(faults)]


def main() -> int:
    """Print the table; return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="bf16, and on sm_90 fp32 and fp64 too")
    parser.add_argument("--faults", action="store_true", help="print only rows with a fault, and the summary")
    parser.add_argument("--first", type=int, metavar="N", help="only so many for each GPU: does it work at all?")
    arguments = parser.parse_args()
    checked = CHECKED_QUICKLY if arguments.quick else CHECKED
    jobs = [
        (*variant, architecture)
        for architecture, dtypes in checked.items()
        for variant in itertools.islice(variants(dtypes).items(), arguments.first)
    ]
    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache
        futures = [pool.submit(row, *job) for job in jobs]
        rows = [future.result() for future in tqdm(futures, unit="variant", mininterval=2)]
    headers = ["GPU", "kernel", "launch", "registers", "shared", "spills", "loop", "bytes", "fault"]
    print(tabulate([row for row in rows if row[-1] or not arguments.faults], headers, disable_numparse=True))
    faults = collections.Counter(bool(row[-1]) for row in rows)
    print(f"\n{len(rows)} compilations, {faults[True]} with a fault (triton {triton.__version__})")
    return 1 if faults[True] else 0


if __name__ == "__main__":
    sys.exit(main())
