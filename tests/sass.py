"""What nvcc makes of the CUDA kernels, read from their machine code (SASS): no GPU needed."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"Function : (\S+)")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?(.*?);")
KERNEL = re.compile(r"([a-z]+)_kernelI\w*?Li(\d+)ELb([01])E\w*?ActivationE(\d)")
BRANCH = re.compile(r"BRA\b.*?(0x[0-9a-f]+)")
WIDE_LOAD = re.compile(r"LDG\.E\S*\.(64|128)\S* R(\d+),")


@dataclass
class Kernel:
    """One instantiation for 16-bit elements."""

    name: str
    vector: int
    channels_last: bool
    activation: int
    code: list[tuple[int, str]]  # address, instruction

    def spills(self):
        return sum(bool(re.match(r"LDL|STL", text)) for _, text in self.code)

    def loop(self):
        """The instructions of the loop over elements: the longest with loads and without a barrier."""
        found = []
        for end, text in self.code:
            branch = BRANCH.match(text)
            if branch and (start := int(branch[1], 16)) < end:
                body = [each for at, each in self.code if start <= at <= end]
                loads = any(each.startswith("LDG") for each in body)
                if loads and not any("BAR.SYNC" in each for each in body):
                    found.append(body)
        return max(found, key=len)

    def wide_loads_at_once(self):
        """Loads of whole vectors that are issued before the first of them is waited for, where that are most."""
        pending, issued, most = set(), 0, 0
        for text in self.loop():
            used = {int(number) for number in re.findall(r"\bR(\d+)\b", text)}
            if used & pending:
                pending, issued = set(), 0
            load = WIDE_LOAD.match(text)
            if load and int(load[1]) == 16 * self.vector:  # bits
                first, registers = int(load[2]), self.vector // 2
                pending |= set(range(first, first + registers))
                issued += 1
                most = max(most, issued)
        return most

    def narrow_accesses(self):
        """Accesses to single 16-bit elements in the loop."""
        return sum(bool(re.match(r"(LDG|STG)\.E\S*U16", text)) for text in self.loop())


def cuobjdump():
    """Beside nvcc, or inside the triton package; None if there is none."""
    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(inside) if inside.exists() else None)


def kernels(cubin):
    """All in that file that are templates of element accesses."""
    listing = subprocess.run([cuobjdump(), "-sass", cubin], check=True, capture_output=True, text=True).stdout
    found = {}
    for line in listing.splitlines():
        if function := FUNCTION.search(line):
            code = found.setdefault(function[1], [])
        elif instruction := INSTRUCTION.match(line):
            code.append((int(instruction[1], 16), instruction[2]))
    for mangled, code in found.items():
        name, vector, channels_last, activation = KERNEL.search(mangled).groups()
        yield Kernel(name, int(vector), channels_last == "1", int(activation), code)
