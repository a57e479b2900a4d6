"""What is built of the real sources: the CUDA library, one object for an instruction set, wheels."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from build_tools import CHECKOUT, STAND_INS, needs_compiler, needs_nvcc, output, write

from brn_kernels import node
from brn_kernels.build import place, recipe, tools


@needs_nvcc
def test_the_cuda_sources_compile(tmp_path):
    kit = tools.gather(cuda=True)
    manifest = recipe.manifest("cuda", ["90"], False, kit)
    assert place.ensure(tmp_path, [manifest], kit, say=print) == ("cuda",)


@needs_compiler
@pytest.mark.skipif(not recipe.can_have_autograd(), reason="Python's headers are missing")
def test_autograds_node_compiles(tmp_path):
    """`brn build` leaves it out where it does not: calls then stay in Python, without a word."""
    if node.module() is not None:
        return  # of these very sources, or it would not have been loaded
    kit = tools.gather(cuda=False)
    manifest = recipe.manifest("autograd", [], False, kit)
    assert place.ensure(tmp_path, [manifest], kit, say=print) == ("autograd",)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has more than one instruction set")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_kernels_of_an_instruction_set_define_nothing_the_linker_could_merge(tmp_path):
    """Of weak symbols it keeps one, and the baseline would then run a function compiled for AVX."""
    csrc, kit = recipe.sources(), tools.gather(cuda=False)
    compilations = recipe.compilations("cpu", csrc, [], False)
    commands = recipe.commands("cpu", csrc, [], False, kit)
    running = {}
    for each in compilations:
        if "-DBRN_ISA=avx2" in each.flags:
            path = tmp_path / Path(each.object).name
            quickly = ["-O1" if flag == "-O3" else flag for flag in commands[each.object]]
            command = [*quickly, "-c", str(csrc / each.source), "-o", str(path)]
            running[path] = subprocess.Popen(command)
    assert running, "no kernels"
    for path, process in running.items():
        assert process.wait() == 0
        symbols = [line.split() for line in output("nm", "--defined-only", str(path)).splitlines()]
        mergeable = [name for _, kind, name in symbols if kind in "VvWwu" and name != "DW.ref.__gxx_personality_v0"]
        assert symbols and not mergeable, mergeable  # but for a pointer, the same in all


def setuptools_is_too_old():
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) < 77
    except importlib.metadata.PackageNotFoundError:
        return True


@needs_compiler
@pytest.mark.skipif(setuptools_is_too_old(), reason="setuptools 77 or later is not installed")
@pytest.mark.parametrize("libraries", [False, True], ids=["pure", "with libraries"])
def test_wheels_carry_csrc_and_the_libraries_if_asked(tmp_path, libraries):
    ours = shutil.ignore_patterns("_native", "__pycache__")
    shutil.copytree(CHECKOUT / "brn_kernels", tmp_path / "brn_kernels", ignore=ours)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(CHECKOUT / name, tmp_path)
    write(tmp_path / "csrc", STAND_INS | {"autograd/node.cpp": "int node;\n"})  # of one Python and one PyTorch
    for folder in ("brn_kernels", "build/lib/brn_kernels"):
        write(tmp_path / folder / "_native", {"brn_kernels_cpu-0.so": "of the checkout, or of an earlier build"})
    command = "import setuptools.build_meta as meta; print(meta.build_wheel('dist'))"
    asked_for = {"BRN_BUILD_NATIVE": "1" if libraries else "0", "BRN_KERNELS_CACHE": str(tmp_path / "none")}
    environment = os.environ | asked_for
    run = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"brn_kernels/csrc/{name}" for name in STAND_INS} <= set(names)
    native = sorted(Path(name).suffix for name in names if "_native" in name)
    if libraries:
        assert wheel.stem.rpartition("-none-")[0].endswith("-py3") and "any" not in wheel.stem
        assert native == [".json", ".so"] and "brn_kernels/_native/brn_kernels_cpu-0.so" not in names
    else:
        assert wheel.stem.endswith("-py3-none-any") and native == []
