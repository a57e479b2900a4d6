"""The programs that compile: where they are, which they are, and what to do if one is missing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace


class BuildError(RuntimeError):
    """The libraries cannot be compiled; the message is the compiler's own, or says what is missing."""


@dataclass(frozen=True)
class Kit:
    """What compiles: ninja, the C++ compiler, and nvcc where it is needed."""

    ninja: str
    cxx: tuple[str, ...]
    cxx_version: str
    nvcc: str | None = None
    nvcc_version: str = ""


def gather(cuda: bool) -> Kit:
    """Find the programs.

    Raises:
        BuildError: one is missing.
    """
    cxx = _cxx()
    kit = Kit(_ninja(), tuple(cxx), _output([*cxx, "--version"]).splitlines()[0])
    if not cuda:
        return kit
    for_gpus = nvcc()
    if for_gpus is None:
        raise BuildError("nvcc is missing: install the CUDA toolkit and put it in PATH, or build with --no-cuda")
    return replace(kit, nvcc=for_gpus, nvcc_version=_output([for_gpus, "--version"]).splitlines()[-1])


def nvcc() -> str | None:
    """That of ``$CUDA_HOME``, else the one in PATH."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def in_order(architectures: Sequence[str]) -> list[str]:
    """GPU architectures as nvcc numbers them (``sm_90`` is ``90``), the newest last.

    Raises:
        BuildError: one is not a number.
    """
    names = {name.removeprefix("sm_") for name in architectures}
    if bad := sorted(name for name in names if not re.fullmatch(r"\d{2,3}[af]?", name)):
        raise BuildError(f"a GPU architecture is a number, for example 90; got {', '.join(bad)}")
    return sorted(names, key=lambda name: (int(name.rstrip("af")), name))


def known_to(nvcc: str | None, default: Sequence[str], asked_for: Sequence[str] | None) -> list[str]:
    """The architectures asked for, else those of the default that this nvcc can compile for.

    Raises:
        BuildError: it cannot compile for one that was asked for, or for none of the default.
    """
    known = re.findall(r"compute_(\d+)", _output([nvcc or "nvcc", "--list-gpu-arch"]))
    wanted = in_order(default) if asked_for is None else list(asked_for)
    possible = [name for name in wanted if name.rstrip("af") in known]
    if not possible or (asked_for is not None and possible != wanted):
        unknown = ", ".join(name for name in wanted if name not in possible)
        raise BuildError(f"this nvcc does not compile for {unknown}, only for {', '.join(known)}")
    return possible


def newer_than_torch(kit: Kit, torchs: str | None) -> str | None:
    """What to know if nvcc is of a newer CUDA than torch's (for example ``"12.8"``) by its first number; else None."""
    found = re.search(r"cuda_(\d+)\.(\d+)", kit.nvcc_version)
    if found is None or torchs is None or int(found[1]) <= int(torchs.partition(".")[0]):
        return None
    version = f"{found[1]}.{found[2]}"
    return (
        f"note: nvcc is of CUDA {version}, torch of {torchs}: the library will need a driver for CUDA {found[1]}, newer"
        f" than torch does. Where `brn info` says that it is too old, build with the nvcc of CUDA {torchs} (CUDA_HOME)"
    )


def _ninja() -> str:
    scripts = sysconfig.get_path("scripts")  # where pip puts it: in PATH only while the environment is activated
    found = shutil.which("ninja", path=scripts) or shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is missing: pip install ninja")
    return found


def _cxx() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))  # may be more than a name: "ccache g++"
    for command in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    what = f"CXX names {named[0]}, which is not there" if named else "a C++ compiler is missing"
    raise BuildError(f"{what}: install g++ or clang++ (the system's package manager has both), or name one in CXX")


def _output(command: Sequence[str]) -> str:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if run.returncode or not run.stdout.strip():
        raise BuildError(f"{shlex.join(command)} fails:\n{run.stdout}")
    return run.stdout.strip()
