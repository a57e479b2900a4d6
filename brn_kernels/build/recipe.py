"""What is compiled, from what and with which flags; and the manifest that says so of a library."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .tools import BuildError, Kit

PACKAGE = Path(__file__).absolute().parents[1]
SOURCE_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")

# GPUs: from Turing to Blackwell. What is compiled for 80 also runs on 86 and 89, for 100 on 103, for 120 on 121.
ARCHITECTURES = ("75", "80", "90", "100", "120")
AVX512 = tuple("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split())
INSTRUCTION_SETS = {  # of x86-64: cpu/kernels*.cpp is compiled once for each, and the best is chosen when it runs
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": AVX512,
    "avx512bf16": (*AVX512, "-mavx512bf16"),
}
LOOP_FLAGS = ("-fno-math-errno", "-fno-exceptions")  # sqrt is an instruction; nothing in the loops throws
CXX_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")
CUDA_CXX_FLAGS = ("-DUSE_CUDA", "-DBRN_CUDA")
NVCC_FLAGS = ("-std=c++17", "-O3", "-DBRN_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden")
OPTIMIZED = ("-O3",)
SANITIZED = (
    *("-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
)
EMULATED = (
    *("-DBRN_EMULATED", "-Og", "-Icsrc/emulation", "-Wno-unknown-pragmas", "-Wno-unused"),
    *("-U_FORTIFY_SOURCE",),  # it takes a jump between fibers for a mistake
)
AUTOGRAD_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden")  # PyTorch's whole interface, not the stable one
OPTIMIZED_AUTOGRAD = ("-O2",)
SANITIZED_AUTOGRAD = (*SANITIZED, "-fno-sanitize=vptr")  # it asks for types that PyTorch keeps to itself
TORCH_LIBRARIES = ("-ltorch_cpu", "-ltorch", "-lc10")  # no torch_cuda: CPU builds of torch have none to link with

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Compilation:
    """A source below csrc becomes an object."""

    source: str
    object: str
    flags: tuple[str, ...]
    tool: str = "cxx"


def sources() -> Path | None:
    """The folder csrc: inside an installed package, beside it in a checkout; None if there is none."""
    return next((csrc for csrc in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (csrc / "ops.cpp").exists()), None)


def can_have_autograd() -> bool:
    """Whether the ``autograd`` library can be compiled: Python's headers are not everywhere."""
    csrc = sources()
    return (
        csrc is not None and (csrc / "autograd").is_dir() and Path(sysconfig.get_path("include"), "Python.h").exists()
    )


def compilations(library: str, csrc: Path, architectures: Sequence[str], sanitize: bool) -> list[Compilation]:
    """All that goes into a library."""
    if library == "emulated":
        return _emulated(csrc)
    if library == "autograd":
        flags = (*AUTOGRAD_FLAGS, *(SANITIZED_AUTOGRAD if sanitize else OPTIMIZED_AUTOGRAD))
        paths = sorted(csrc.glob("autograd/*.cpp"))
        return [Compilation(f"autograd/{path.name}", f"autograd/{path.stem}.o", flags) for path in paths]
    return _cuda(csrc, architectures) if library == "cuda" else _cpu(csrc, sanitize)


def _cpu(csrc: Path, sanitize: bool) -> list[Compilation]:
    flags = (*CXX_FLAGS, *(SANITIZED if sanitize else OPTIMIZED))
    instruction_sets: dict[str, tuple[str, ...]] = {"baseline": ()}
    if sanitize:  # it runs where it is compiled, and takes minutes for each instruction set
        flags += ("-DBRN_ONE_ISA",)
        instruction_sets = {"baseline": ("-march=native",)}
    elif platform.machine() == "x86_64":
        instruction_sets = INSTRUCTION_SETS
    found = [Compilation("ops.cpp", "cpu/ops.o", flags)]
    for path in sorted(csrc.glob("cpu/*.cpp")):
        source = f"cpu/{path.name}"
        if path.name.startswith("kernels"):
            for name, special in instruction_sets.items():
                each = (*flags, *LOOP_FLAGS, *special, f"-DBRN_ISA={name}")
                found.append(Compilation(source, f"cpu/{path.stem}.{name}.o", each))
        else:
            found.append(Compilation(source, f"cpu/{path.stem}.o", flags))
    return found


def _cuda(csrc: Path, architectures: Sequence[str]) -> list[Compilation]:
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    code += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in architectures[-1:]]  # PTX, for newer GPUs
    found = [Compilation("ops.cpp", "cuda/ops.o", (*CXX_FLAGS, *OPTIMIZED, *CUDA_CXX_FLAGS))]
    for path in sorted(csrc.glob("cuda/*.cu")):
        found.append(Compilation(f"cuda/{path.name}", f"cuda/{path.stem}.o", (*NVCC_FLAGS, *code), tool="nvcc"))
    return found


def _emulated(csrc: Path) -> list[Compilation]:
    """The CUDA kernels as C++, for tests on machines without a GPU."""
    flags = (*CXX_FLAGS, *CUDA_CXX_FLAGS, *EMULATED)
    found = [Compilation("ops.cpp", "emulated/ops.o", flags)]
    for path in sorted(csrc.glob("emulation/*.cpp")):
        found.append(Compilation(f"emulation/{path.name}", f"emulated/{path.stem}.o", flags))
    for path in sorted(csrc.glob("cuda/*.cu")):
        each = (*flags, "-x", "c++")
        found.append(Compilation(f"cuda/{path.name}", f"emulated/cuda/{path.stem}.o", each))
    return found


def link_flags(library: str, sanitize: bool) -> tuple[str, ...]:
    """Those after the objects. Torch's libraries are loaded before ours: no path to them is recorded."""
    if library == "cuda":
        return ("-shared", "-cudart=static", *TORCH_LIBRARIES)
    if library == "emulated":
        return ("-shared", "-Wl,-Bsymbolic", *TORCH_LIBRARIES)  # its own stream, even where torch has CUDA's
    if library == "autograd":
        # Python's own symbols are there when it is loaded
        return ("-shared", *(SANITIZED_AUTOGRAD if sanitize else ()), "-ltorch_python", *TORCH_LIBRARIES)
    if sanitize or sys.platform != "linux":
        return ("-shared", *(SANITIZED if sanitize else ()), *TORCH_LIBRARIES)
    return ("-shared", "-Wl,--no-undefined", *TORCH_LIBRARIES)  # better now than when it is loaded


def commands(library: str, csrc: Path, architectures: Sequence[str], sanitize: bool, kit: Kit) -> dict[str, list[str]]:
    """The command that makes each object, ``-c``, ``-o`` and names apart; and the one that links (``"link"``)."""
    torch_directory = Path(torch.__file__).parent
    # a user's newer compiler may warn of what ours does not: that must not keep anybody from compiling
    strict = ["-Werror"] if (PACKAGE.parent / ".git").exists() and not sanitize else []
    reproducible = f"-fmacro-prefix-map={torch_directory}=torch"  # of what torch's error messages quote
    cxx = [*kit.cxx, "-isystem", f"{torch_directory}/include", reproducible, "-Wall", "-Wextra"]
    host = ["-ccbin", *kit.cxx] if len(kit.cxx) == 1 else []
    if library == "autograd":
        cxx += ["-isystem", sysconfig.get_path("include")]
    programs = {"cxx": [*cxx, *strict], "nvcc": [kit.nvcc or "nvcc", *host]}
    found = {}
    for each in compilations(library, csrc, architectures, sanitize):
        found[each.object] = [*programs[each.tool], *each.flags]
    linker = programs["nvcc"] if library == "cuda" else [*kit.cxx]
    return found | {"link": [*linker, f"-L{torch_directory}/lib"]}


def digest_of_sources(library: str) -> str | None:
    """Of all that a library is compiled from; None if the sources are not there."""
    csrc = sources()
    if csrc is None:
        return None
    folders = ("cuda", "emulation") if library == "emulated" else (library,)
    digest = hashlib.sha256()
    for path in sorted(path for folder in (csrc, *(csrc / name for name in folders)) for path in folder.glob("*.*")):
        if path.suffix in SOURCE_SUFFIXES:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(csrc)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def manifest(library: str, architectures: Sequence[str], sanitize: bool, kit: Kit) -> Manifest:
    """What is recorded of a library compiled now.

    Raises:
        BuildError: there is nothing to compile.
    """
    csrc = sources()
    if csrc is None:
        raise BuildError(f"the sources are missing: there is no csrc in or beside {PACKAGE}")
    if len(compilations(library, csrc, architectures, sanitize)) < (1 if library == "autograd" else 2):
        raise BuildError(f"the sources are missing: there is nothing in {csrc / library}")
    return {
        "library": library,
        "sanitize": sanitize,
        "architectures": list(architectures),
        "machine": _machine(),
        "torch": str(torch.__version__),
        "python": _python() if library == "autograd" else None,
        "compiler": f"{kit.cxx_version}, {kit.nvcc_version}" if library == "cuda" else kit.cxx_version,
        "sources": digest_of_sources(library),
        "flags": _digest_of_flags(library, csrc, architectures, sanitize),
    }


def unfit(found: Manifest, sources_digest: str | None, any_torch: bool) -> str | None:
    """Why the library of that manifest cannot be taken here and now; None if it can.

    Args:
        found: The manifest.
        sources_digest: That of today; None: no sources, so that any are as good.
        any_torch: Whether it may have been compiled for another version of torch.
    """
    if found.get("machine") != _machine():
        return f"compiled for {found.get('machine')} and this is {_machine()}"
    if not any_torch and found.get("torch") != torch.__version__:
        return f"compiled for torch {found.get('torch')} and this is {torch.__version__}"
    if found.get("python") not in (None, _python()):
        return f"compiled for {found['python']} and this is {_python()}"
    csrc = sources()
    if sources_digest is None or csrc is None:
        return None
    if found.get("sources") != sources_digest:
        return "compiled from other sources than these"
    flags = _digest_of_flags(found["library"], csrc, found.get("architectures", ()), found.get("sanitize", False))
    return None if found.get("flags") == flags else "compiled with other flags than today's"


def file_name(manifest: Manifest) -> str:
    """The library's; one manifest, one name."""
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return f"brn_kernels_{manifest['library']}-{key[:16]}.so"


def _python() -> str:
    return str(sysconfig.get_config_var("SOABI"))


def _machine() -> str:
    return f"{sys.platform}-{platform.machine()}"


def _digest_of_flags(library: str, csrc: Path, architectures: Sequence[str], sanitize: bool) -> str:
    """Of those that change what is compiled: warnings, and where torch is, do not."""
    flags = [compilations(library, csrc, architectures, sanitize), link_flags(library, sanitize)]
    return hashlib.sha256(repr(flags).encode()).hexdigest()
