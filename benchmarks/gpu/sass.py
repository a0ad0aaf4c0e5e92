"""Machine code of a kernel: its main loop, and what is in it.

A loop is the code from a branch's target to that backward branch. The main loop is the one with the most tensor-core
instructions, the shortest of these if there are several. All of it is counted, also what is seldom executed: first and
last blocks, a raised maximum, soft caps. What the assembler moved out of the loop's range is not.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

TENSOR = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA")

#: class -> opcodes. ALU is the pipe of logic, shifts and byte permutes: half as wide as an instruction slot.
CLASSES: dict[str, tuple[str, ...]] = {
    "tensor": TENSOR,
    "LDG": ("LDG", "LDGSTS"),
    "LDS/STS": ("LDS", "STS", "LDSM", "STSM"),
    "local": ("LDL", "STL"),
    "PRMT": ("PRMT",),
    "LOP3": ("LOP3",),
    "SHF": ("SHF", "SHL", "SHR", "LEA"),
    "IMAD": ("IMAD",),
    "IADD": ("IADD3", "IADD", "VIADD"),
    "compare": ("ISETP", "FSETP", "FMNMX", "FMNMX3", "IMNMX", "VIMNMX", "SEL", "FSEL", "PLOP3", "LOP"),
    "FP32": ("FFMA", "FMUL", "FADD", "FFMA2"),
    "FP16": ("HFMA2", "HADD2", "HMUL2", "HSETP2"),
    "MUFU": ("MUFU",),
    "convert": ("I2F", "I2FP", "F2I", "F2F", "F2FP", "I2I"),
    "shuffle": ("SHFL", "MOVM", "VOTE", "REDUX"),
    "move": ("MOV", "CS2R", "UMOV", "R2UR"),
}
ALU = frozenset(
    (*CLASSES["PRMT"], *CLASSES["LOP3"], *CLASSES["SHF"], *CLASSES["IADD"], *CLASSES["compare"], "MOV", "I2FP", "F2FP")
)

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)(.*)$")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    text: str


@dataclass(frozen=True)
class Loop:
    """The instructions of one loop, in order."""

    instructions: tuple[Instruction, ...]

    @property
    def tensor_count(self) -> int:
        return sum(instruction.opcode in TENSOR for instruction in self.instructions)

    @property
    def alu_count(self) -> int:
        return sum(instruction.opcode in ALU for instruction in self.instructions)

    def classes(self) -> dict[str, int]:
        """Instructions by class; "other" is what no class names."""
        class_of = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}
        return dict(Counter(class_of.get(instruction.opcode, "other") for instruction in self.instructions))


def main_loop(sass: str) -> Loop:
    """`sass` as nvdisasm -c prints one kernel. Raises ValueError if no loop has a tensor-core instruction."""
    loops = [loop for loop in _loops(sass) if loop.tensor_count]
    if not loops:
        raise ValueError(f"no loop with one of {', '.join(TENSOR)} in {len(sass.splitlines())} lines")
    most = max(loop.tensor_count for loop in loops)
    return min((loop for loop in loops if loop.tensor_count == most), key=lambda loop: len(loop.instructions))


def longest_loop(sass: str) -> Loop:
    """As `main_loop`, of a kernel without products."""
    return max(_loops(sass), key=lambda loop: len(loop.instructions))


def _loops(sass: str) -> list[Loop]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            if found[1] == "BRA" and (target := _TARGET.search(found[3])):
                branches.append((len(instructions), target[1]))
            instructions.append(Instruction(found[1], line.strip()))
    backward = [(labels[target], at) for at, target in branches if labels.get(target, at + 1) <= at]
    return [Loop(tuple(instructions[first : last + 1])) for first, last in backward]
