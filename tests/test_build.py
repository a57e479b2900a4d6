"""The build of the C++ and CUDA libraries. Stand-ins for csrc take a tenth of a second each to compile."""

import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from build_tools import CHECKOUT, STAND_INS, needs_compiler, needs_nvcc, output, write

from brn_kernels import cli
from brn_kernels.build import BuildError, build, cache_directory, find, packaged_directory, recipe, tools


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """A checkout with stand-ins, in a folder whose name ninja and the shell must not read; its csrc."""
    checkout = tmp_path / "it's $HOME: 100% odd"
    write(checkout / "csrc", STAND_INS)
    monkeypatch.setattr(recipe, "PACKAGE", checkout / "brn_kernels")
    monkeypatch.setenv("BRN_KERNELS_CACHE", str(checkout / "the cache"))
    monkeypatch.delenv("BRN_KERNELS_SANITIZE", raising=False)
    return checkout / "csrc"


def answer(path):
    return ctypes.CDLL(str(path)).answer()


def edit_manifest(library, **changes):
    path = library.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@needs_compiler
def test_what_is_built_is_found_and_built_once(csrc, monkeypatch):
    assert find() == "not built: run `brn build`"
    lines = []
    built = build(progress=lines.append)
    assert built.compiled == ("cpu",) and built.cpu.parent == cache_directory() and built.cuda is None
    assert answer(built.cpu) == 42
    assert lines[-1].endswith("link cpu") and lines[0].startswith("[1/")
    if platform.machine() == "x86_64":
        assert any(line.endswith("cpu/kernels.cpp (avx512)") for line in lines), lines
    again = build(progress=lambda line: pytest.fail(f"compiled again: {line}"))
    assert again.cpu == built.cpu and again.compiled == ()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("find() must not start processes"))
    assert find().cpu == built.cpu


@needs_compiler
@pytest.mark.parametrize("source", ["arguments.h", "cpu/kernels.cpp", "cpu/new.h"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_library_of_other_sources_is_not_found(csrc, source, in_place):
    before = build(directory=packaged_directory() if in_place else None)
    with open(csrc / source, "a") as file:
        file.write("// changed\n")
    assert find() == "stale, compiled from other sources than these: run `brn build`"
    after = build()
    assert find().cpu == after.cpu != before.cpu


@needs_compiler
def test_a_library_is_found_again_when_its_sources_come_back(csrc):
    before = build()
    write(csrc, {"arguments.h": "#define ANSWER 43\n"})
    assert answer(build().cpu) == 43
    write(csrc, STAND_INS)
    assert find().cpu == before.cpu and build().compiled == ()


@needs_compiler
def test_cuda_sources_do_not_matter_to_the_cpu_library(csrc):
    built = build()
    write(csrc, {"cuda/kernels.cu": "changed"})
    assert find().cpu == built.cpu


@needs_compiler
def test_a_library_of_other_flags_is_not_found(csrc, monkeypatch):
    build()
    monkeypatch.setattr(recipe, "OPTIMIZED", ("-O2",))
    assert "other flags" in find()


@needs_compiler
def test_in_the_cache_only_a_library_of_this_torch_is_found(csrc):
    edit_manifest(build().cpu, torch="2.9.1")
    assert find() == f"stale, compiled for torch 2.9.1 and this is {torch.__version__}: run `brn build`"


@needs_compiler
def test_in_the_package_a_library_of_any_torch_is_found_and_comes_first(csrc):
    packaged = build(directory=packaged_directory())
    edit_manifest(packaged.cpu, torch="2.10.0")
    assert find().cpu == packaged.cpu
    assert build(progress=lambda line: pytest.fail(f"compiled again: {line}")).cpu == packaged.cpu
    assert not cache_directory().exists()


@needs_compiler
def test_a_packaged_library_is_found_without_sources_but_one_of_the_cache_is_not(csrc):
    build()
    shutil.rmtree(csrc)
    assert find() == "not built: run `brn build`"
    with pytest.raises(BuildError, match="the sources are missing"):
        build()
    write(csrc, STAND_INS)
    packaged = build(directory=packaged_directory())
    shutil.rmtree(csrc)
    assert find().cpu == packaged.cpu


@needs_compiler
def test_a_library_for_another_machine_is_not_found(csrc):
    edit_manifest(build(directory=packaged_directory()).cpu, machine="linux-m68k")
    assert "compiled for linux-m68k and this is" in find()


@needs_compiler
def test_a_library_without_its_manifest_is_not_found(csrc):
    built = build()
    built.cpu.with_suffix(".json").unlink()
    assert find() == "not built: run `brn build`"


@needs_compiler
def test_a_manifest_without_its_library_is_built_again(csrc):
    built = build()
    built.cpu.unlink()
    assert find() == "not built: run `brn build`"
    assert answer(build().cpu) == 42


@needs_compiler
@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_no_manifest(csrc, content):
    built = build()
    built.cpu.with_suffix(".json").write_text(content)
    assert find() == "not built: run `brn build`"
    assert build().compiled == ("cpu",) and find().cpu == built.cpu


@needs_compiler
def test_in_place_is_copied_from_the_cache_and_leaves_one_library(csrc):
    build()
    first = build(directory=packaged_directory(), progress=lambda line: pytest.fail(f"compiled again: {line}"))
    write(csrc, {"arguments.h": "#define ANSWER 43\n"})
    second = build(directory=packaged_directory())
    assert answer(second.cpu) == 43 and first.cpu.parent == second.cpu.parent == packaged_directory()
    assert sorted(packaged_directory().glob("[!.]*")) == sorted([second.cpu, second.cpu.with_suffix(".json")])


@needs_compiler
def test_sanitized_libraries_are_kept_apart(csrc, monkeypatch):
    write(csrc, {"autograd/node.cpp": NODE})
    plain = build()
    assert find(sanitize=True) == "not built: run `brn build --sanitize`"
    if shutil.which("g++") and not Path(output("g++", "-print-file-name=libasan.so")).is_absolute():
        pytest.skip("no AddressSanitizer to link with")
    sanitized = build(sanitize=True)
    assert sanitized.compiled == ("cpu", "autograd")
    for found, built in ((find(), plain), (find(sanitize=True), sanitized)):
        assert (found.cpu, found.autograd) == (built.cpu, built.autograd)
    assert not {plain.cpu, plain.autograd} & {sanitized.cpu, sanitized.autograd}
    monkeypatch.setenv("BRN_KERNELS_SANITIZE", "1")
    assert find().cpu == sanitized.cpu and find(sanitize=False).cpu == plain.cpu
    with pytest.raises(BuildError, match="not for the CUDA library"):
        build(sanitize=True, cuda=True)


BUILDER = """
import sys, time
from pathlib import Path
from brn_kernels.build import build, recipe
recipe.PACKAGE = Path(sys.argv[1]) / "brn_kernels"
print("ready", flush=True)
sys.stdin.readline()
built = build(progress=lambda line: print(line, flush=True))
print("compiled" if built.compiled else "reused", built.cpu)
"""


def start_builder(csrc, cxx):
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(csrc.parent)],
        env=os.environ | {"CXX": str(cxx)},
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def slow_compiler(folder, seconds):
    path = folder / "slow-g++"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) sleep {seconds} ;; esac\nexec {tools._cxx()[0]} "$@"\n'
    )
    path.chmod(0o755)
    return path


@needs_compiler
def test_of_two_processes_one_compiles_and_the_other_waits(csrc, tmp_path):
    cxx = slow_compiler(tmp_path, 0.5)
    builders = [start_builder(csrc, cxx) for _ in range(2)]
    for builder in builders:
        assert builder.stdout.readline() == "ready\n"
    outputs = [None, None]
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()
    for i, builder in enumerate(builders):
        outputs[i] = builder.communicate(timeout=120)[0].splitlines()
        assert builder.returncode == 0
    (one, path), (other, other_path) = (lines[-1].split(" ", 1) for lines in outputs)
    assert {one, other} == {"compiled", "reused"} and path == other_path
    waiting = outputs[0] if one == "reused" else outputs[1]
    assert waiting[0].startswith("waiting for another process that builds in"), waiting
    assert answer(path) == 42
    assert sorted(entry.suffix for entry in cache_directory().glob("[!.]*")) == [".json", ".so"]


@needs_compiler
def test_a_builder_that_is_killed_leaves_nothing_that_is_taken(csrc, tmp_path):
    builder = start_builder(csrc, slow_compiler(tmp_path, 60))
    builder.stdin.write("go\n")
    builder.stdin.flush()
    deadline = time.monotonic() + 120
    while not list(cache_directory().glob("tmp-*/build.ninja")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.communicate()
    assert list(cache_directory().glob("tmp-*")), "killed too late"
    assert find() == "not built: run `brn build`"
    assert answer(build().cpu) == 42
    assert not list(cache_directory().glob("tmp-*"))


@needs_compiler
def test_a_failure_shows_what_the_compiler_says_and_leaves_nothing(csrc):
    write(csrc, {"cpu/kernels.cpp": "#error the_message_of_the_compiler\n"})
    with pytest.raises(BuildError, match="the_message_of_the_compiler"):
        build()
    assert not list(cache_directory().glob("[!.]*"))
    assert find() == "not built: run `brn build`"


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="the linker is asked for this on Linux")
def test_a_function_that_nobody_defines_fails_when_linking(csrc):
    write(csrc, {"cpu/dispatch.cpp": "void nowhere();\nvoid call() { nowhere(); }\n"})
    with pytest.raises(BuildError, match="nowhere"):
        build()


@needs_compiler
@pytest.mark.parametrize("developer", [True, False])
def test_a_warning_is_an_error_to_developers_only(csrc, developer):
    write(csrc, {"cpu/dispatch.cpp": "int warned(int unused) { return 1; }\n"})
    if developer:
        (csrc.parent / ".git").mkdir()
        with pytest.raises(BuildError, match="Werror"):
            build()
    else:
        lines = []
        build(progress=lines.append)
        assert "unused" in lines[-1]


@needs_compiler
def test_sources_that_change_meanwhile_are_noticed(csrc):
    def change(_):
        write(csrc, {"arguments.h": "#define ANSWER 43\n"})

    with pytest.raises(BuildError, match="changed while they were compiled"):
        build(progress=change)
    assert find() == "not built: run `brn build`"


@needs_compiler
def test_nothing_to_compile_is_an_error(csrc):
    shutil.rmtree(csrc / "cpu")
    with pytest.raises(BuildError, match="there is nothing in .*cpu"):
        build()


def test_a_missing_compiler_is_named(csrc, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        BuildError, match=r"a C\+\+ compiler is missing: install g\+\+ or clang\+\+ .* or name one in CXX"
    ):
        build()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(BuildError, match="CXX names no-such-compiler, which is not there"):
        build()


@needs_compiler
def test_missing_ninja_and_nvcc_are_named(csrc, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which(tools._cxx()[0]))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(tools.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(BuildError, match="ninja is missing: pip install ninja"):
        build()
    (tmp_path / "ninja").touch(mode=0o755)
    with pytest.raises(BuildError, match="nvcc is missing: .* or build with --no-cuda"):
        build(cuda=True)


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(csrc, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BRN_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    assert find() == "not built: run `brn build`"
    with pytest.raises(BuildError, match=r"cannot write to .*cache \(Not a directory\): set BRN_KERNELS_CACHE"):
        build()


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("BRN_KERNELS_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_directory() == Path("/a")
    monkeypatch.delenv("BRN_KERNELS_CACHE")
    assert cache_directory() == Path("/b/brn_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("/c/.cache/brn_kernels")


def test_architectures_are_numbers():
    assert tools.in_order(["sm_100", "90", "90a", "80"]) == ["80", "90", "90a", "100"]
    with pytest.raises(BuildError, match="a GPU architecture is a number, for example 90; got hopper"):
        build(architectures=["hopper"])


def test_an_nvcc_newer_than_torchs_cuda_is_told_of():
    """Its library needs a newer driver than torch, and said so only when the first kernel was launched."""
    kit = tools.Kit("ninja", ("g++",), "g++ 13", "nvcc", "Build cuda_13.0.r13.0/compiler.36424714_0")
    assert "nvcc is of CUDA 13.0, torch of 12.8" in tools.newer_than_torch(kit, "12.8")
    assert tools.newer_than_torch(kit, "13.2") is tools.newer_than_torch(kit, None) is None
    assert tools.newer_than_torch(tools.Kit("ninja", ("g++",), "g++ 13"), "12.8") is None


@needs_nvcc
def test_both_libraries_are_built_and_found(csrc):
    cpu = build(cuda=False)
    both = build(architectures=["sm_90", "80"])
    assert both.compiled == ("cuda",) and both.cpu == cpu.cpu and both.architectures == ("80", "90")
    assert find().cuda == both.cuda and find().architectures == ("80", "90")
    write(csrc, {"cuda/kernels.cu": "changed"})
    assert find().cpu == cpu.cpu and find().cuda is None
    with pytest.raises(BuildError, match="does not compile for 999, only for .*90"):
        build(architectures=["999"])


NODE = "int node;\n"


@needs_compiler
def test_autograds_node_is_built_beside_the_kernels(csrc):
    write(csrc, {"autograd/node.cpp": NODE})
    built = build()
    assert built.compiled == ("cpu", "autograd") and find().autograd == built.autograd
    write(csrc, {"autograd/node.cpp": NODE + "int other;\n"})
    assert find().autograd is None and find().cpu == built.cpu
    assert build().compiled == ("autograd",)


@needs_compiler
@pytest.mark.parametrize("made_for", [{"python": "cpython-30"}, {"torch": "1.0"}], ids=["python", "torch"])
def test_autograds_node_of_other_versions_is_not_found_even_in_the_package(csrc, made_for):
    write(csrc, {"autograd/node.cpp": NODE})
    built = build(directory=packaged_directory())
    assert find().autograd == built.autograd
    edit_manifest(built.autograd, **made_for)
    assert find().autograd is None and find().cpu == built.cpu


@needs_compiler
def test_kernels_are_built_where_autograds_node_does_not_compile(csrc, tmp_path):
    write(csrc, {"autograd/node.cpp": "this is no C++"})
    lines = []
    built = build(progress=lines.append)
    assert built.compiled == ("cpu",) and built.autograd is None and find().cpu == built.cpu
    assert "calls stay in Python" in lines[-1] and "node.cpp" in lines[-1]


@needs_compiler
def test_what_is_packaged_needs_no_compiler_for_autograds_node(csrc, monkeypatch):
    build(directory=packaged_directory())
    write(csrc, {"autograd/node.cpp": NODE})
    monkeypatch.setenv("PATH", "/nonexistent")
    lines = []
    assert build(progress=lines.append).compiled == () and "calls stay in Python" in lines[-1]


@needs_compiler
def test_autograds_node_for_another_python_stays_beside_it(csrc):
    write(csrc, {"autograd/node.cpp": NODE})
    other = build(directory=packaged_directory()).autograd
    edit_manifest(other, python="cpython-30")
    for suffix in (".so", ".json"):
        other.with_suffix(suffix).rename(other.with_name(f"brn_kernels_autograd-other{suffix}"))
    assert build(directory=packaged_directory()).compiled == ("autograd",)
    assert len(list(packaged_directory().glob("*autograd*.json"))) == 2


def test_without_pythons_headers_autograds_node_is_left_out(csrc, monkeypatch, tmp_path):
    write(csrc, {"autograd/node.cpp": NODE})
    assert recipe.can_have_autograd()
    monkeypatch.setattr(recipe.sysconfig, "get_path", lambda _: str(tmp_path))
    assert not recipe.can_have_autograd()


@needs_compiler
def test_the_command_builds(csrc, capsys):
    assert cli.main(["build", "--no-cuda", "--in-place"]) == 0
    said = capsys.readouterr()
    assert (
        f"cpu  compiled: {find().cpu}\ncuda not asked for\nautograd left out: needs a compiler and Python.h\nin "
        in said.out
    )
    assert "[1/" in said.err
    assert cli.main(["build"]) == 0
    assert f"cpu  there already: {find().cpu}" in capsys.readouterr().out


@needs_compiler
def test_the_command_fails_with_the_compilers_message(csrc, capsys):
    write(csrc, {"ops.cpp": "#error the_message_of_the_compiler\n"})
    assert cli.main(["build"]) == 1
    said = capsys.readouterr()
    assert "brn build: the native backend does not compile:" in said.err and "the_message_of_the_compiler" in said.err
    assert not said.out
