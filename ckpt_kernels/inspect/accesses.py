"""What a kernel reads and writes, by operand: from Triton's own intermediate code, where addresses still have names.

    "%u_18 = tt.addptr %u_17, %column_15 : tensor<1x4096x!tt.ptr<bf16>>, tensor<1x4096xi32>"
    "%u_19 = tt.load %u_18 : tensor<1x4096x!tt.ptr<bf16>>"

is one read of 4,096 elements of the operand that %u_17 was made from. Each access is there once, before the compiler
turns it into instructions of a thread, and before it moves those of a loop's next steps ahead.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_ARGUMENT = re.compile(r"(%[\w.]+): !tt\.ptr<(\w+)>")
_DEFINED = re.compile(r"^\s*(%[\w.]+)(?::\d+)? = [\w.]+ (%[\w.]+)")
_CARRIED = re.compile(r"(%[\w.]+) = (%[\w.]+)[,)]")
_ACCESS = re.compile(r"tt\.(load|store) (%[\w.]+)")
_POINTERS = re.compile(r"tensor<((?:\d+x)+)!tt\.ptr<(\w+)>|!tt\.ptr<(\w+)>")
_NUMBER = re.compile(r"\d+")


class Access(NamedTuple):
    """One read or write of `elements` of `size` bytes, of the operand of that number among those that are pointers.

    `loop` is the number of the innermost loop that it is in, from 1 on in order, or 0 outside of all.
    """

    operand: int
    elements: int
    size: int
    store: bool
    loop: int = 0


def parse(code: str) -> list[Access]:
    """The accesses of a kernel, in order.

    Args:
        code: of the kernel, as Triton has it in `compiled.asm["ttir"]`.

    Returns:
        A list of `Access`; of addresses that come from no operand there is none.
    """
    operand: dict[str, int] = {}
    # The indentation and the number of each loop that is open.
    open_loops: list[tuple[int, int]] = []
    loops = 0
    found = []
    for line in code.splitlines():
        indent = len(line) - len(line.lstrip())
        if open_loops and indent <= open_loops[-1][0]:
            open_loops.pop()
        if "tt.func" in line:
            operand = {name: number for number, (name, _) in enumerate(_ARGUMENT.findall(line))}
        elif access := _ACCESS.search(line):
            types = list(_POINTERS.finditer(line))
            if access[2] in operand and types:
                shape, inner, scalar = types[0].groups()
                elements = math.prod(map(int, _NUMBER.findall(shape or "")))
                loop = open_loops[-1][1] if open_loops else 0
                bits = int(_NUMBER.findall(inner or scalar)[-1])
                found.append(Access(operand[access[2]], elements, bits // 8, access[1] == "store", loop))
        elif "scf.for" in line or "scf.while" in line:
            loops += 1
            open_loops.append((indent, loops))
            operand |= {inner: operand[outer] for inner, outer in _CARRIED.findall(line) if outer in operand}
        elif (defined := _DEFINED.match(line)) and defined[2] in operand and "!tt.ptr" in line:
            operand[defined[1]] = operand[defined[2]]
    return found


def bytes_once(accesses: Iterable[Access]) -> int:
    """Bytes that cross memory if each operand is read once and written once."""
    widest: dict[tuple[int, bool], int] = {}
    for one in accesses:
        key = one.operand, one.store
        widest[key] = max(widest.get(key, 0), one.elements * one.size)
    return sum(widest.values())


def passes(accesses: Iterable[Access]) -> dict[int, int]:
    """How often each operand that is read is read as a whole: once in each loop that reads it, or once where none does.

    What a step of a loop reads a second time is in the first-level cache, and what is read before a loop is a part.
    """
    loops: dict[int, set[int]] = {}
    for one in accesses:
        if not one.store:
            loops.setdefault(one.operand, set()).add(one.loop)
    return {operand: max(len(found - {0}), 1) for operand, found in loops.items()}


def bytes_again(accesses: Iterable[Access]) -> int:
    """Bytes that are read in a second pass and in later ones."""
    given = [one for one in accesses if not one.store]
    times = passes(given)
    return sum((times[number] - 1) * bytes_once(a for a in given if a.operand == number) for number in times)
