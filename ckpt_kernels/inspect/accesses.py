"""Parses a kernel's memory accesses by operand from Triton IR (TTIR), where each address still names its operand.

    "%u_18 = tt.addptr %u_17, %column_15 : tensor<1x4096x!tt.ptr<bf16>>, tensor<1x4096xi32>"
    "%u_19 = tt.load %u_18 : tensor<1x4096x!tt.ptr<bf16>>"

is one read of 4,096 elements of the operand that %u_17 was computed from. TTIR has each access exactly once: the
compiler has not yet lowered accesses to instructions per thread, nor pipelined the loads of loops.
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
    """One read or write of a tile.

    Attributes:
        operand: the number of the operand among the kernel's pointers.
        elements: the number of elements accessed.
        size: the bytes of an element.
        store: whether the access writes.
        loop: the number of the innermost loop around the access, from 1 in order of the code; 0 outside all loops.
    """

    operand: int
    elements: int
    size: int
    store: bool
    loop: int = 0


def parse(code: str) -> list[Access]:
    """Return the accesses of a kernel in order.

    Args:
        code: the TTIR of the kernel, `compiled.asm["ttir"]`.

    Returns:
        A list of `Access`. Accesses through addresses that come from no operand are left out.
    """
    operand: dict[str, int] = {}
    # The indentation and the number of each open loop.
    open_loops: list[tuple[int, int]] = []
    loops = 0
    accesses = []
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
                accesses.append(Access(operand[access[2]], elements, bits // 8, access[1] == "store", loop))
        elif "scf.for" in line or "scf.while" in line:
            loops += 1
            open_loops.append((indent, loops))
            operand |= {inner: operand[outer] for inner, outer in _CARRIED.findall(line) if outer in operand}
        elif (defined := _DEFINED.match(line)) and defined[2] in operand and "!tt.ptr" in line:
            operand[defined[1]] = operand[defined[2]]
    return accesses


def bytes_once(accesses: Iterable[Access]) -> int:
    """Return the bytes that cross memory if each operand is read once and written once."""
    widest: dict[tuple[int, bool], int] = {}
    for one in accesses:
        key = one.operand, one.store
        widest[key] = max(widest.get(key, 0), one.elements * one.size)
    return sum(widest.values())


def passes(accesses: Iterable[Access]) -> dict[int, int]:
    """Return for each operand the number of full reads: the number of loops that read the operand, but at least one.

    A second read within one step of a loop hits the first-level cache. Reads outside loops cover only a part of an
    operand that a loop reads too.
    """
    loops: dict[int, set[int]] = {}
    for one in accesses:
        if not one.store:
            loops.setdefault(one.operand, set()).add(one.loop)
    return {operand: max(len(numbers - {0}), 1) for operand, numbers in loops.items()}


def bytes_again(accesses: Iterable[Access]) -> int:
    """Return the bytes that the second and later passes read."""
    reads = [one for one in accesses if not one.store]
    times = passes(reads)
    return sum((times[number] - 1) * bytes_once(a for a in reads if a.operand == number) for number in times)
