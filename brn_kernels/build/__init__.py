"""Compiles the native backend from csrc/, and finds what was compiled.

There are three libraries: ``cpu``, ``cuda``, and ``autograd``, a Python module, which alone is good for one version of
PyTorch and one of Python. Beside each lies its manifest, which says what it was compiled from, by
what, and for what; a library whose manifest does not fit is never taken.

setup.py loads this package by its path: nothing in it imports anything else of brn_kernels.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import place, recipe, tools
from .recipe import Manifest
from .tools import BuildError

SANITIZE_VARIABLE = "BRN_KERNELS_SANITIZE"

__all__ = ["BuildError", "Built", "build", "cache_directory", "find", "packaged_directory"]


@dataclass(frozen=True)
class Built:
    """The compiled libraries.

    Attributes:
        cpu: The library to load for CPUs; load it first, it defines the operators.
        cuda: The library to load for GPUs, or None if there is none.
        autograd: The module for calls in C++, or None if there is none.
        architectures: The GPUs ``cuda`` was compiled for, for example ``("80", "90")``; it runs on newer ones too.
        compiled: Which of the libraries were compiled just now; the others were there already.
        seconds: How long that took.
    """

    cpu: Path
    cuda: Path | None = None
    autograd: Path | None = None
    architectures: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    seconds: float = 0.0


def build(
    *,
    cuda: bool | None = None,
    autograd: bool = True,
    architectures: Sequence[str] | None = None,
    sanitize: bool = False,
    directory: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Built:
    """Compile the libraries, or reuse those compiled from the same sources in the same way.

    Any number of processes may call it at once: one compiles, the others wait for it.

    Args:
        cuda: Whether to compile the CUDA library too; None: if torch is a CUDA build and there is an nvcc.
        autograd: Whether to compile the module for calls in C++ too, where that can be: it is not worth an error.
        architectures: GPUs to compile for, for example ``["90"]`` (this implies ``cuda``); None:
            ``recipe.ARCHITECTURES``, as far as nvcc knows them.
        sanitize: With AddressSanitizer and UndefinedBehaviorSanitizer; not the CUDA library.
        directory: Where to, copied from the cache if that has them; others there are removed. None: the cache, unless
            the package has them.
        progress: Called with each line of progress.

    Raises:
        BuildError: a tool is missing, compilation failed (the message is the compiler's), or nothing can be written.
    """
    start = time.monotonic()
    if sanitize and (cuda or architectures):
        raise BuildError("the sanitizers are not for the CUDA library: leave it out")
    if cuda is None:
        by_default = torch.version.cuda is not None and tools.nvcc() is not None and not sanitize
        cuda = architectures is not None or by_default
    if architectures is not None:
        architectures = tools.in_order(architectures)
    autograd = autograd and recipe.can_have_autograd()
    wanted = [library for library, asked in (("cpu", True), ("cuda", cuda), ("autograd", autograd)) if asked]
    found = {}
    if directory is None:
        for library in wanted:
            at_hand = _look_for(library, sanitize, [packaged_directory()])
            as_asked = library != "cuda" or architectures is None
            if not isinstance(at_hand, str) and (as_asked or at_hand[1]["architectures"] == architectures):
                found[library] = at_hand
    kernels = [library for library in wanted if library not in found and library != "autograd"]
    compiled: tuple[str, ...] = ()
    say = progress or (lambda _: None)
    if kernels:
        now, compiled = _compiled(kernels, architectures, sanitize, directory, say)
        found |= now
    if "autograd" in wanted and "autograd" not in found:
        try:
            now, too = _compiled(["autograd"], None, sanitize, directory, say)
        except BuildError as error:  # it uses what PyTorch does not promise to keep
            say(f"calls stay in Python: {error}")
        else:
            found, compiled = found | now, compiled + too
    return _built(found, compiled, time.monotonic() - start)


def _compiled(
    libraries: Sequence[str],
    architectures: Sequence[str] | None,
    sanitize: bool,
    directory: Path | None,
    say: Callable[[str], None],
) -> tuple[dict[str, tuple[Path, Manifest]], tuple[str, ...]]:
    """The libraries with their manifests, and which of them were compiled just now."""
    kit = tools.gather(cuda="cuda" in libraries)
    known = tools.known_to(kit.nvcc, recipe.ARCHITECTURES, architectures) if "cuda" in libraries else []
    manifests = [recipe.manifest(library, known if library == "cuda" else [], sanitize, kit) for library in libraries]
    where, cache = (directory or cache_directory()).absolute(), None
    if directory is not None:
        with contextlib.suppress(BuildError):
            cache = cache_directory()
    if note := tools.newer_than_torch(kit, torch.version.cuda):
        say(note)
    compiled = place.ensure(where, manifests, kit, say=say, spare=cache, only=directory is not None)
    return {manifest["library"]: (where / recipe.file_name(manifest), manifest) for manifest in manifests}, compiled


def find(sanitize: bool | None = None) -> Built | str:
    """The libraries to load, or the reason why there are none. Compiles nothing.

    What was compiled into the package comes first, then what was last asked for of the cache.

    Args:
        sanitize: Those with sanitizers; None: if ``$BRN_KERNELS_SANITIZE`` is 1.
    """
    if sanitize is None:
        sanitize = os.environ.get(SANITIZE_VARIABLE) == "1"
    directories = [packaged_directory()]
    if recipe.sources() is not None:  # else nothing tells whose sources the cache's libraries were compiled from
        with contextlib.suppress(BuildError):
            directories.append(cache_directory())
    cpu = _look_for("cpu", sanitize, directories)
    if isinstance(cpu, str):
        return cpu
    others = {library: _look_for(library, sanitize, directories) for library in ("cuda", "autograd")}
    return _built({"cpu": cpu} | {library: found for library, found in others.items() if not isinstance(found, str)})


def packaged_directory() -> Path:
    """Where setup.py and ``brn build --in-place`` put the libraries."""
    return recipe.PACKAGE / "_native"


def cache_directory() -> Path:
    """``$BRN_KERNELS_CACHE``, else ``$XDG_CACHE_HOME/brn_kernels``, else ``~/.cache/brn_kernels``."""
    if named := os.environ.get("BRN_KERNELS_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "brn_kernels")
    except RuntimeError:
        raise BuildError("there is no home folder: set BRN_KERNELS_CACHE to a folder for the libraries") from None


def _look_for(library: str, sanitize: bool, directories: Sequence[Path]) -> tuple[Path, Manifest] | str:
    """The first library that fits and its manifest, or why there is none."""
    reasons = []
    sources = recipe.digest_of_sources(library)
    for directory in directories:
        for path, manifest in place.libraries(library, directory):
            if manifest.get("sanitize") != sanitize:
                continue
            # the stable ABI makes a packaged one good for every torch; in the cache each torch has its own
            stable = directory == packaged_directory() and library != "autograd"
            reason = recipe.unfit(manifest, sources, any_torch=stable)
            if reason is None:
                return path, manifest
            reasons.append(reason)
    run = f"run `brn build{' --sanitize' if sanitize else ''}`"
    return f"stale, {reasons[0]}: {run}" if reasons else f"not built: {run}"


def _built(found: dict[str, tuple[Path, Manifest]], compiled: tuple[str, ...] = (), seconds: float = 0.0) -> Built:
    cuda, manifest = found.get("cuda", (None, {}))
    autograd = found["autograd"][0] if "autograd" in found else None
    return Built(found["cpu"][0], cuda, autograd, tuple(manifest.get("architectures", ())), compiled, seconds)
