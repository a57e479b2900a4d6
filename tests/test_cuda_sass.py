"""The CUDA kernels' machine code: registers do not spill, accesses are wide, loads do not wait for each other."""

import subprocess

import pytest
import sass
from build_tools import needs_nvcc

from brn_kernels.build import recipe, tools

pytest.importorskip("triton", reason="no triton, whose cuobjdump reads machine code")


@needs_nvcc
@pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_machine_code_in_half_precision(direction, tmp_path):
    """Of sm_90. Loads of 16-bit elements were put together one by one, each waiting for the one before."""
    csrc, source = recipe.sources(), f"cuda/{direction}_bfloat16.cu"
    commands = recipe.commands("cuda", csrc, ["90"], False, tools.gather(cuda=True))
    command = [each for each in commands[source.replace(".cu", ".o")] if not each.startswith("-gencode")]
    cubin = tmp_path / "kernels.cubin"
    subprocess.run([*command, "-arch=sm_90", "-cubin", str(csrc / source), "-o", str(cubin)], check=True)
    found = list(sass.kernels(cubin))
    assert {kernel.name for kernel in found} == (
        {"stream", "repair"} if direction == "forward" else {"reduce", "apply"}
    )
    for kernel in found:
        about = f"{kernel.name}, {kernel.vector} elements, channels_last {kernel.channels_last}, {kernel.activation}"
        assert kernel.spills() == 0, about
        if kernel.vector > 1:
            assert kernel.narrow_accesses() == 0, about
            assert kernel.wide_loads_at_once() >= 4, f"{about}: {kernel.wide_loads_at_once()} loads"
        else:
            assert kernel.narrow_accesses() > 0, f"{about}: the check does not see accesses"
