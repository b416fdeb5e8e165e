"""Parses the machine code of a kernel (SASS), as nvdisasm prints it, into basic blocks, and finds the loops.

    "        /*0ae0*/              @!P0 LDG.E.128 R64, desc[UR30][R36.64+0x1000] ;"

is an instruction at 0xae0, guarded by a predicate, with the opcode LDG and modifiers. Labels end in colons; branches
name labels in backquotes. Only reachable blocks are kept. The loops are natural loops: a back edge goes to a block, the
head, that dominates the source of the edge, and the loop is the head with all blocks that reach the edge without
passing the head.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PIPES = ("fp32", "integer", "special", "load/store", "other")

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^(\.[\w$.]+):")
_TARGET = re.compile(r"`\((\.[\w$.]+)\)")

# Opcodes without modifiers. All others are "other": control flow, barriers, and the uniform datapath, whose results all
# threads of a warp share. They take an issue slot of the scheduler as all instructions do.
_FP32 = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2", "IMAD"}
_SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"}
_LOAD_STORE = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "LD", "ST", "LDGSTS", "LDSM", "STSM", "SHFL", "ATOM", "ATOMG",
               "ATOMS", "RED", "REDG"}  # fmt: skip
_INTEGER = {"IADD3", "IADD", "LOP3", "SHF", "SHL", "SHR", "LEA", "ISETP", "FSETP", "FMNMX", "FMNMX3", "FSEL", "FSET",
            "SEL", "PRMT", "IABS", "IMNMX", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3", "MOV", "F2FP", "I2FP", "I2IP",
            "PLOP3", "P2R", "R2P", "SGXT", "BMSK", "CS2R", "IDP", "HMNMX2", "HSETP2", "VABSDIFF", "HSET2"}  # fmt: skip
_GLOBAL = {"LDG", "STG", "LDGSTS"}


class Instruction(NamedTuple):
    """One instruction; `target` is the label of a branch."""

    opcode: str
    operands: str = ""
    guarded: bool = False
    target: str = ""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        """The pipe, one of PIPES. Comparisons, selections and conversions in pairs belong to "integer"."""
        for pipe, names in zip(PIPES, (_FP32, _INTEGER, _SPECIAL, _LOAD_STORE), strict=False):
            if self.name in names:
                return pipe
        return "other"

    @property
    def width(self) -> int:
        """The bytes that a thread moves to or from global, shared or local memory; 0 for other instructions."""
        if self.pipe != "load/store" or self.name == "SHFL":
            return 0
        bits = re.search(r"\.(?:[US])?(8|16|32|64|128)\b", self.opcode)
        return int(bits[1]) // 8 if bits else 4


class Block(NamedTuple):
    """A basic block: instructions in sequence, and the numbers of the successors."""

    instructions: list[Instruction]
    next: list[int]


def parse(listing: str) -> list[Block]:
    """Return the reachable blocks of the first function of a listing, in order.

    Args:
        listing: the output of `nvdisasm -c` for a cubin.

    Returns:
        A list of `Block`; the kernel begins with the first.

    Raises:
        ValueError: the listing has no instruction.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            if label[1].startswith(".text.") and instructions:
                break
            labels[label[1]] = len(instructions)
        elif match := _LINE.search(line):
            target = _TARGET.search(match[3])
            guard, opcode, operands = match[1], match[2], match[3].strip()
            instructions.append(
                Instruction(opcode, operands, guard not in (None, "PT", "UPT"), target[1] if target else "")
            )
    if not instructions:
        raise ValueError("the listing has no instruction; expected what nvdisasm -c prints")
    return _reachable(_blocks(instructions, labels))


def _blocks(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Block]:
    """Cut the instructions into blocks, before each label and after each branch."""
    leaves = {"BRA", "EXIT", "RET", "BRX", "JMP"}
    cuts = {0, *labels.values(), *(i + 1 for i, one in enumerate(instructions) if one.name in leaves)}
    starts = sorted(cut for cut in cuts if cut < len(instructions))
    number = {start: i for i, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        last = instructions[end - 1]
        following = [number[labels[last.target]]] if last.name == "BRA" and labels.get(last.target) in number else []
        # A guarded branch, or one with a predicate operand, may fall through. A call returns.
        is_conditional = last.guarded or (last.name == "BRA" and re.match(r"!?U?P\d", last.operands))
        if (last.name not in leaves or is_conditional) and end in number:
            following.append(number[end])
        blocks.append(Block(list(instructions[start:end]), following))
    return blocks


def _reachable(blocks: list[Block]) -> list[Block]:
    """Drop unreachable blocks and renumber the others."""
    seen, to_see = {0}, [0]
    while to_see:
        new = [b for b in blocks[to_see.pop()].next if b not in seen]
        seen.update(new)
        to_see += new
    number = {old: new for new, old in enumerate(sorted(seen))}
    return [Block(blocks[old].instructions, [number[b] for b in blocks[old].next]) for old in sorted(seen)]


def innermost_loops(blocks: Sequence[Block]) -> list[list[int]]:
    """Return the loops that contain no other loop, each as a list of block numbers, in order of address."""
    predecessors: list[set[int]] = [set() for _ in blocks]
    for number, block in enumerate(blocks):
        for following in block.next:
            predecessors[following].add(number)
    # dominators[b]: the blocks on every path from the entry to block b.
    dominators = [{0}] + [set(range(len(blocks)))] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            common = set.intersection(*(dominators[b] for b in predecessors[number])) | {number}
            changed |= common != dominators[number]
            dominators[number] = common
    loops: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for head in block.next:
            if head in dominators[number]:
                body, to_see = loops.setdefault(head, {head}), [number]
                while to_see:
                    if (one := to_see.pop()) not in body:
                        body.add(one)
                        to_see += predecessors[one]
    bodies = list(loops.values())
    inner = [b for b in bodies if not any(other < b for other in bodies)]
    return sorted(sorted(body) for body in inner)


class Counts(NamedTuple):
    """The instructions of a thread by pipe, and the bytes that they move.

    Attributes:
        pipes: the number of instructions by pipe.
        loaded, stored: bytes of global memory.
        shared: bytes of shared memory.
        exchanges: shuffles between the lanes of a warp.
        barriers: barriers between the warps of a program.
    """

    pipes: Counter[str]
    loaded: int
    stored: int
    shared: int
    exchanges: int
    barriers: int

    @property
    def instructions(self) -> int:
        return self.pipes.total()


def count(instructions: Iterable[Instruction]) -> Counts:
    """Count instructions; an instruction counts as often as the iterable has it."""
    instructions = list(instructions)
    bytes_of: Counter[str] = Counter()
    for one in instructions:
        if one.name in _GLOBAL:
            bytes_of["stored" if one.name == "STG" else "loaded"] += one.width
        if one.name in ("LDS", "STS", "LDGSTS"):
            bytes_of["shared"] += one.width
    names = Counter(one.name for one in instructions)
    return Counts(
        Counter(one.pipe for one in instructions),
        bytes_of["loaded"],
        bytes_of["stored"],
        bytes_of["shared"],
        names["SHFL"],
        names["BAR"],
    )
