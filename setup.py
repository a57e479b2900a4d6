"""What pyproject.toml cannot say: the wheel carries csrc and, with BRN_BUILD_NATIVE=1, the compiled native backend."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = os.environ.get("BRN_BUILD_NATIVE", "0") not in ("", "0")
ROOT = Path(__file__).absolute().parent


def compile_into(directory):
    """Compile the native backend by brn_kernels/build, without importing brn_kernels."""
    spec = importlib.util.spec_from_file_location("brn_build", ROOT / "brn_kernels/build/__init__.py")
    sys.modules[spec.name] = brn_build = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(brn_build)
    except ModuleNotFoundError as error:
        sys.exit(f"BRN_BUILD_NATIVE=1 needs {error.name}: install it and add --no-build-isolation")
    try:
        brn_build.build(directory=directory, autograd=False, progress=lambda line: print(line, flush=True))
    except brn_build.BuildError as error:
        sys.exit(f"BRN_BUILD_NATIVE=1: {error}")
    (directory / brn_build.place.LOCK).unlink()


class BuildPackage(build_py):
    """The Python files, then csrc (so that ``brn build`` works from a wheel), then the libraries."""

    def run(self):
        """Into build_lib; an editable install stays in the checkout, where csrc already is."""
        super().run()
        package = ROOT / "brn_kernels" if self.editable_mode else Path(self.build_lib).absolute() / "brn_kernels"
        if not self.editable_mode:
            for folder in ("csrc", "_native"):  # an earlier build may have left its own
                shutil.rmtree(package / folder, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", package / "csrc")
        if NATIVE:
            compile_into(package / "_native")


class Wheel(bdist_wheel):
    """The libraries depend on the platform, not on the version of Python."""

    def get_tag(self):
        """py3-none-<platform>."""
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if NATIVE else tag


class WithLibraries(Distribution):
    """Goes where platform-dependent packages go."""

    def has_ext_modules(self):
        """Yes, though setuptools does not compile them."""
        return NATIVE


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel}, distclass=WithLibraries)
