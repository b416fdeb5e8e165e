"""The states of random number generators at the start of a layer's call, restored when the call is repeated.

Torch's generators for the CPU and for the devices of a call's tensors, Python's and numpy's global generators, and the
generators of all three that are attributes within the layer.
"""

import contextlib
import ctypes
import functools
import random
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch


class _State(Protocol):
    """The state of one generator, as it was when the object was made."""

    def is_current(self) -> bool:
        """Whether no random number has been drawn since."""
        ...

    def restore(self) -> None: ...


# How many bytes are compared at either end of a state. All generators on the CPU are Mersenne Twisters: a draw moves a
# position or a number held back, which are kept at one of the ends, or makes all words anew. To read a whole state
# takes as long as a small layer and empties the processor's first cache.
_AT_END = 128


def _ends_of(address: int, size: int) -> bytes:
    """The first and the last bytes of a state in memory."""
    length = min(size, _AT_END)
    return ctypes.string_at(address, length) + ctypes.string_at(address + size - length, length)


class _OfTorch:
    """The state of one of torch's generators, kept as bytes, which no measurement of torch's memory counts."""

    def __init__(self, generator: torch.Generator) -> None:
        state = generator.get_state()
        self._generator = generator
        self._state = ctypes.string_at(state.data_ptr(), state.nbytes)
        self._ends = _ends_of(state.data_ptr(), state.nbytes)

    def is_current(self) -> bool:
        state = self._generator.get_state()
        return _ends_of(state.data_ptr(), state.nbytes) == self._ends

    def restore(self) -> None:
        self._generator.set_state(torch.frombuffer(bytearray(self._state), dtype=torch.uint8))


class _InMemory:
    """The words and the position of a Mersenne Twister in memory. Python and numpy copy them number by number.

    Args:
        address: the address.
        state: the bytes expected there.
    """

    def __init__(self, address: int, state: bytes) -> None:
        self.is_known = ctypes.string_at(address, len(state)) == state
        length = min(len(state), _AT_END)
        ends = ctypes.c_char * length
        self._first, self._last = ends.from_address(address), ends.from_address(address + len(state) - length)
        self._was_first, self._was_last = self._first.raw, self._last.raw

    def is_current(self) -> bool:
        return self._first.raw == self._was_first and self._last.raw == self._was_last


class _OfPython:
    """The state of Python's global generator, an object that holds the state itself."""

    def __init__(self) -> None:
        self._generator: Any = random.getstate.__self__  # type: ignore[attr-defined]
        self._state = random.getstate()
        _, (*words, position), self._normal = self._state
        self._memory: _InMemory | None = None
        if sys.implementation.name == "cpython":
            # The position, then the words.
            expected = struct.pack(f"=i{len(words)}I", position, *words)
            start = id(self._generator)
            offset = ctypes.string_at(start, type(self._generator).__basicsize__).find(expected)
            self._memory = None if offset < 0 else _InMemory(start + offset, expected)

    def is_current(self) -> bool:
        if self._memory is not None:
            return self._memory.is_current() and self._generator.gauss_next == self._normal
        return random.getstate() == self._state

    def restore(self) -> None:
        random.setstate(self._state)


class _OfNumpy:
    """The state of numpy's global generator, at an address that numpy publishes.

    Of two normal numbers made together numpy holds the second back, elsewhere; while it does so, numpy is asked.
    """

    def __init__(self) -> None:
        module: Any = sys.modules["numpy"].random
        self._random = module
        self._state = module.get_state(legacy=False)
        generator: Any = module.get_bit_generator() if hasattr(module, "get_bit_generator") else None
        self._generator = generator
        self._memory: _InMemory | None = None
        if type(generator) is module.MT19937 and not self._state["has_gauss"]:
            words, position = self._state["state"]["key"], self._state["state"]["pos"]
            expected = words.tobytes() + int(position).to_bytes(4, sys.byteorder)
            memory = _InMemory(generator.ctypes.state_address, expected)
            self._memory = memory if memory.is_known else None

    def is_current(self) -> bool:
        if self._memory is not None and self._random.get_bit_generator() is self._generator:
            return self._memory.is_current()
        return _are_equal(self._random.get_state(legacy=False), self._state)

    def restore(self) -> None:
        self._random.set_state(self._state)


class _OfObject:
    """The state of a generator of Python or numpy that is no global one."""

    def __init__(self, generator: Any) -> None:
        if isinstance(generator, random.Random):
            self._get, self._set = generator.getstate, generator.setstate
        elif hasattr(generator, "bit_generator"):
            bits = generator.bit_generator
            self._get, self._set = lambda: bits.state, lambda state: setattr(bits, "state", state)
        else:  # numpy's RandomState
            self._get, self._set = functools.partial(generator.get_state, legacy=False), generator.set_state
        self._state = self._get()

    def is_current(self) -> bool:
        return _are_equal(self._get(), self._state)

    def restore(self) -> None:
        self._set(self._state)


def generator_types() -> tuple[type, ...]:
    """The classes of generators whose states are known: torch's, Python's, and numpy's once numpy is imported."""
    numpy: Any = sys.modules.get("numpy.random")
    return torch.Generator, random.Random, *(() if numpy is None else (numpy.Generator, numpy.RandomState))


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two states of numpy, dicts of numbers and arrays, are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


class RandomState:
    """The states of several generators.

    Args:
        states: by generator; Python's and numpy's modules stand for their global generators.
    """

    def __init__(self, states: dict[Any, _State]) -> None:
        self._states = states

    @staticmethod
    def now(generators: Iterable[Any], before: "RandomState | None" = None) -> "RandomState":
        """The present state of these generators, Python's and numpy's. States of `before` that are current are used."""
        known = {} if before is None else before._states
        numpy = sys.modules.get("numpy")
        sources = *generators, random, *(() if numpy is None else (numpy,))
        return RandomState({source: _state_of(source, known.get(source)) for source in sources})

    def is_current(self) -> bool:
        """Whether no random number has been drawn since."""
        return all([state.is_current() for state in self._states.values()])

    def restore(self) -> None:
        """Gives the generators these states."""
        for state in self._states.values():
            if not state.is_current():
                state.restore()

    @staticmethod
    @contextlib.contextmanager
    def kept(states: "Iterable[RandomState]") -> Iterator[None]:
        """A context after which the generators of these states are as before."""
        known = {source: state for one in states for source, state in one._states.items()}
        current = {source: _state_of(source, state) for source, state in known.items()}
        try:
            yield
        finally:
            for state in current.values():
                if not state.is_current():
                    state.restore()


def _state_of(source: Any, known: _State | None) -> _State:
    """The present state of a generator: `known` if that is still current."""
    if known is not None and known.is_current():
        return known
    if source is random:
        return _OfPython()
    if isinstance(source, torch.Generator):
        return _OfTorch(source)
    return _OfNumpy() if source is sys.modules.get("numpy") else _OfObject(source)
