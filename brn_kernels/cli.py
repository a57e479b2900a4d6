"""The command ``brn``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import __version__, available_backends, backends, node
from .cli_user import add_advise, add_tune

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib", "tabulate", "tqdm", "torchvision", "timm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``brn`` with these arguments (default: the process's); returns the exit status."""
    parser = argparse.ArgumentParser(prog="brn", description="Batch Renormalization for PyTorch.")
    parser.add_argument("--version", action="version", version=f"brn_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for add in (_add_info, _add_build, _add_demo, _add_bench, add_advise, add_tune):
        add(commands)
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["bench"]:  # it has a parser of its own
        return _bench(given[1:])
    arguments = parser.parse_args(given)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return 130


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("info", help="versions, devices, backends and why one cannot run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info)


def _add_build(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "build",
        help="compile the native backend: C++ for CPUs, CUDA for GPUs",
        description="Compile the native backend, unless it is there already. Needs a C++ compiler and ninja; the CUDA "
        "library needs nvcc too.",
    )
    parser.add_argument(
        "--cuda",
        action=argparse.BooleanOptionalAction,
        help="compile for GPUs too (default: if torch is a CUDA build and there is an nvcc)",
    )
    parser.add_argument("--arch", nargs="+", metavar="NUMBER", help="GPU architectures, for example: --arch 80 90")
    parser.add_argument("--in-place", action="store_true", help="into the package's own folder, not into the cache")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan (not for GPUs)")
    parser.set_defaults(run=_build)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="BatchNorm against Batch Renormalization on real images, in two minutes",
        description="Train a small residual network on scikit-learn's handwritten digits with BatchNorm and with "
        "Batch Renormalization: iid batches, tiny batches, and batches of few classes.",
    )
    parser.add_argument("--seeds", type=int, default=4, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--out", default="brn-demo", help="folder for figure and numbers (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: does it work at all?")
    parser.set_defaults(run=_demo)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands.add_parser("bench", help="time layers and networks against what one would use instead (from a checkout)")


def _info(arguments: argparse.Namespace) -> int:
    try:
        info = _gather_info()
    except (ValueError, RuntimeError) as error:
        print(f"brn: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(info, indent=2))
        return 0
    for title, entries in info.items():
        print(f"{title}:")
        for name, value in entries.items():
            print(f"  {name:<14} {value}")
    return 0


def _gather_info() -> dict[str, dict[str, str]]:
    versions = {"brn_kernels": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["CUDA of torch"] = torch.version.cuda or "none"

    devices = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_processor()}"}
    device_types = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        device_types.insert(0, accelerator.type)
        for index in range(torch.accelerator.device_count()):
            devices[f"{accelerator.type}:{index}"] = _describe(accelerator.type, index)

    choice = {"selected": backends.selected()}
    choice["calls"] = "in Python (`brn build`)" if node.module() is None else "in C++"
    for device_type in device_types:
        choice[f"used on {device_type}"] = backends.resolve(choice["selected"], device_type).__name__.rpartition(".")[2]
    why = {name: "available" if reason is None else f"no: {reason}" for name, reason in available_backends().items()}
    return {"versions": versions, "devices": devices, "backends": why, "choice": choice}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _describe(device_type: str, index: int) -> str:
    if device_type != "cuda":
        return device_type
    properties = torch.cuda.get_device_properties(index)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} "
        f"multiprocessors, compute capability {properties.major}.{properties.minor}"
    )


def _build(arguments: argparse.Namespace) -> int:
    from .build import BuildError, build, packaged_directory

    try:
        built = build(
            cuda=arguments.cuda,
            architectures=arguments.arch,
            sanitize=arguments.sanitize,
            directory=packaged_directory() if arguments.in_place else None,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except BuildError as error:
        print(f"brn build: {error}", file=sys.stderr)
        return 1
    for library, path in (("cpu", built.cpu), ("cuda", built.cuda), ("autograd", built.autograd)):
        what = "compiled" if library in built.compiled else "there already"
        gpus = f" for sm_{', sm_'.join(built.architectures)}" if library == "cuda" else ""
        missing = "left out: needs a compiler and Python.h" if library == "autograd" else "not asked for"
        print(f"{library:<4} {f'{what}{gpus}: {path}' if path else missing}")
    if built.compiled:
        print(f"in {built.seconds:.0f} s")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from .demo import run_demo
    except ModuleNotFoundError as error:
        print(f"brn demo needs {error.name}: pip install 'brn_kernels[demo]'", file=sys.stderr)
        return 1
    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            print(f"brn demo: --{name} must be at least 1, got {getattr(arguments, name)}", file=sys.stderr)
            return 2
    if os.path.exists(arguments.out) and not os.path.isdir(arguments.out):
        print(f"brn demo: --out must be a folder, and {arguments.out} is a file", file=sys.stderr)
        return 2
    seeds, steps = (1, 40) if arguments.quick else (arguments.seeds, arguments.steps)
    run_demo(seeds, steps, arguments.out)
    return 0


def _bench(argv: Sequence[str]) -> int:
    """``bench/`` lies beside the package in a checkout, and is not in a wheel."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "bench" / "cli.py").is_file():
        print(
            "brn bench runs from a checkout of the source: its programs and recorded results are not part of the "
            "installed package. In a clone of brn_kernels: make install && .venv/bin/brn bench --help",
            file=sys.stderr,
        )
        return 1
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        bench = importlib.import_module("bench.cli")
    except ModuleNotFoundError as error:
        print(f"brn bench needs {error.name}: pip install '.[bench]' in the checkout", file=sys.stderr)
        return 1
    status: int = bench.main(argv)
    return status
