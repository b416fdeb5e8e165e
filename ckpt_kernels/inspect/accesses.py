"""What a kernel reads and writes, by operand: from Triton's own intermediate code, where addresses still have names.

    "%u_18 = tt.addptr %u_17, %column_15 : tensor<1x4096x!tt.ptr<bf16>>, tensor<1x4096xi32>"
    "%u_19 = tt.load %u_18 : tensor<1x4096x!tt.ptr<bf16>>"

is one read of 4,096 elements of the operand that %u_17 was made from. Each access is there once, before the compiler
turns it into instructions of a thread, and before it moves those of a loop's next steps ahead.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

_ARGUMENT = re.compile(r"(%[\w.]+): !tt\.ptr<(\w+)>")
_DEFINED = re.compile(r"^\s*(%[\w.]+)(?::\d+)? = [\w.]+ (%[\w.]+)")
_CARRIED = re.compile(r"(%[\w.]+) = (%[\w.]+)[,)]")
_ACCESS = re.compile(r"tt\.(load|store) (%[\w.]+)")
_POINTERS = re.compile(r"tensor<((?:\d+x)+)!tt\.ptr<(\w+)>|!tt\.ptr<(\w+)>")
_NUMBER = re.compile(r"\d+")


class Access(NamedTuple):
    """One read or write of `elements` of `size` bytes, of the operand of that number among those that are pointers."""

    operand: int
    elements: int
    size: int
    store: bool


def parse(code: str) -> list[Access]:
    """The accesses of a kernel, in order.

    Args:
        code: of the kernel, as Triton has it in `compiled.asm["ttir"]`.

    Returns:
        A list of `Access`; of addresses that come from no operand there is none.
    """
    operand: dict[str, int] = {}
    found = []
    for line in code.splitlines():
        if "tt.func" in line:
            operand = {name: number for number, (name, _) in enumerate(_ARGUMENT.findall(line))}
        elif access := _ACCESS.search(line):
            types = list(_POINTERS.finditer(line))
            if access[2] in operand and types:
                shape, inner, scalar = types[0].groups()
                elements = math.prod(map(int, _NUMBER.findall(shape or "")))
                bits = int(_NUMBER.findall(inner or scalar)[-1])
                found.append(Access(operand[access[2]], elements, bits // 8, access[1] == "store"))
        elif "scf.for" in line or "scf.while" in line:
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


def bytes_in_all(accesses: Iterable[Access]) -> int:
    """The same, each operand as often as it is read or written."""
    return sum(one.elements * one.size for one in accesses)


def passes(accesses: Iterable[Access]) -> int:
    """How often the operand is read that is read most often; 0 if none is."""
    return max(Counter(one.operand for one in accesses if not one.store).values(), default=0)
