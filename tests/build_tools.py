"""What the tests of the build share: stand-ins for csrc, and what there is to compile with."""

import subprocess
from pathlib import Path

import pytest

from brn_kernels.build import BuildError, tools

CHECKOUT = Path(__file__).parents[1]
STAND_INS = {
    "arguments.h": "#define ANSWER 42\n",
    "ops.cpp": '#include "arguments.h"\n'
    'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n',
    "cpu/kernels.cpp": "#define NAME(isa) name_##isa\n#define OF(isa) NAME(isa)\nint OF(BRN_ISA)() { return 1; }\n",
    "cpu/dispatch.cpp": "int name_baseline();\nint used() { return name_baseline(); }\n",
    "cuda/kernels.cu": "__global__ void kernel(int* x) { *x = 1; }\nvoid launch(int* x) { kernel<<<1, 1>>>(x); }\n",
}


def missing_tools(cuda=False):
    try:
        tools.gather(cuda=cuda)
    except BuildError as error:
        return str(error)


needs_compiler = pytest.mark.skipif(missing_tools() is not None, reason=f"nothing to compile with: {missing_tools()}")
needs_nvcc = pytest.mark.skipif(missing_tools(True) is not None, reason=f"no CUDA compiled here: {missing_tools(True)}")


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
