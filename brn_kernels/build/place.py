"""Compiles into a directory that others read and write at the same time."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import recipe
from .recipe import Manifest
from .tools import BuildError, Kit

LOCK = ".lock"
STATUS = re.compile(r"\[\d+/\d+\] ")


def libraries(library: str, directory: Path) -> list[tuple[Path, Manifest]]:
    """The complete libraries in a directory with their manifests, the last asked for first."""
    try:
        paths = sorted((path.stat().st_mtime_ns, path) for path in directory.glob(f"brn_kernels_{library}-*.json"))
    except OSError:
        return []
    found = []
    for _, path in reversed(paths):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # removed meanwhile, or damaged
            manifest = json.loads(path.read_bytes())
            if manifest["library"] == library and path.with_suffix(".so").exists():
                found.append((path.with_suffix(".so"), manifest))
    return found


def ensure(
    directory: Path,
    manifests: Sequence[Manifest],
    kit: Kit,
    *,
    say: Callable[[str], None],
    spare: Path | None = None,
    only: bool = False,
) -> tuple[str, ...]:
    """Compile what the directory lacks, and say which libraries that was.

    Args:
        directory: Made if need be.
        manifests: Of the libraries that are to be there.
        kit: What compiles.
        say: Called with each line of progress.
        spare: A directory to copy from what lies there already.
        only: Remove others of the same kind.

    Raises:
        BuildError: the directory cannot be written, or compilation failed.
    """
    with _alone(directory, say):
        missing = [each for each in manifests if not _touched(directory, each)]
        if missing:
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=directory) as work:
                missing = [each for each in missing if not (spare and _copied(spare, Path(work), directory, each))]
                if missing:
                    _compile(Path(work), missing, kit, say)
                for manifest in missing:
                    _move(Path(work), directory, manifest)
        if only:
            for manifest in manifests:
                _remove_others(directory, manifest)
    return tuple(manifest["library"] for manifest in missing)


@contextlib.contextmanager
def _alone(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the directory's lock (the system takes it back from a process that dies) and clear what such a one left."""
    try:
        import fcntl
    except ImportError:
        raise BuildError(f"the native backend cannot be built on {platform.system()}") from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / LOCK, "a")
    except OSError as error:
        advice = "set BRN_KERNELS_CACHE to a folder you can write to"
        raise BuildError(f"cannot write to {directory} ({error.strerror}): {advice}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds in {directory}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in directory.glob("tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield


def _touched(directory: Path, manifest: Manifest) -> bool:
    """Whether the library is there; if so, it is now the last asked for."""
    if not _is_there(directory, manifest):
        return False
    with contextlib.suppress(PermissionError):
        os.utime(directory / Path(recipe.file_name(manifest)).with_suffix(".json"))
    return True


def _copied(spare: Path, work: Path, directory: Path, manifest: Manifest) -> bool:
    if not _is_there(spare, manifest):
        return False
    shutil.copy(spare / recipe.file_name(manifest), work)
    _move(work, directory, manifest)
    return True


def _is_there(directory: Path, manifest: Manifest) -> bool:
    return (directory / recipe.file_name(manifest), manifest) in libraries(manifest["library"], directory)


def _compile(work: Path, manifests: Sequence[Manifest], kit: Kit, say: Callable[[str], None]) -> None:
    csrc = recipe.sources()
    assert csrc is not None
    # Messages then name sources as seen from a checkout; and nvcc cannot be trusted with every path ("$HOME").
    (work / "csrc").symlink_to(csrc)
    rules = [line for manifest in manifests for line in _rules(csrc, manifest, kit)]
    (work / "build.ninja").write_text("\n".join(["rule run", "  command = $run", "  description = $what", *rules, ""]))
    _run_ninja(work, kit.ninja, say)
    for manifest in manifests:
        if recipe.digest_of_sources(manifest["library"]) != manifest["sources"]:
            raise BuildError("the sources changed while they were compiled: build again")


def _rules(csrc: Path, manifest: Manifest, kit: Kit) -> Iterator[str]:
    """The lines of build.ninja that make a library."""
    what = (manifest["library"], csrc, manifest["architectures"], manifest["sanitize"])
    compilations, commands = recipe.compilations(*what), recipe.commands(*what, kit)
    for each in compilations:
        source = f"csrc/{each.source}"
        title = each.source + "".join(f" ({flag[10:]})" for flag in each.flags if flag.startswith("-DBRN_ISA="))
        yield from _edge(each.object, [source], [*commands[each.object], "-c", source, "-o", each.object], title)
    library, objects = recipe.file_name(manifest), [each.object for each in compilations]
    flags = recipe.link_flags(manifest["library"], manifest["sanitize"])
    command = [*commands["link"], *objects, *flags, "-o", library]
    yield from _edge(library, objects, command, f"link {manifest['library']}")


def _edge(output: str, inputs: Sequence[str], command: Sequence[str], title: str) -> list[str]:
    def escaped(path: str) -> str:
        return re.sub(r"([$ :])", r"$\1", path)

    return [
        f"build {escaped(output)}: run {' '.join(map(escaped, inputs))}",
        f"  run = {shlex.join(command).replace('$', '$$')}",
        f"  what = {title.replace('$', '$$')}",
    ]


def _run_ninja(work: Path, ninja: str, say: Callable[[str], None]) -> None:
    environment = os.environ | {"NINJA_STATUS": "[%f/%t] "}
    others = []
    with subprocess.Popen(
        [ninja],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if STATUS.match(line):
                say(line.rstrip())
            else:
                others.append(line)
    output = "".join(others).strip()
    if process.returncode:
        raise BuildError(f"the native backend does not compile:\n{output}")
    if output:
        say(output)  # warnings


def _move(work: Path, directory: Path, manifest: Manifest) -> None:
    """Into place, the manifest last: without it a library does not count."""
    library = recipe.file_name(manifest)
    record = Path(library).with_suffix(".json")
    (work / record).write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(work / library, directory / library)
    os.replace(work / record, directory / record)


def _remove_others(directory: Path, manifest: Manifest) -> None:
    """Those that cannot be of use beside it: another Python, or PyTorch, has an ``autograd`` of its own."""
    same = ("sanitize", "python", "torch") if manifest["library"] == "autograd" else ("sanitize",)
    for path, other in libraries(manifest["library"], directory):
        if path.name != recipe.file_name(manifest) and all(other.get(name) == manifest[name] for name in same):
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
