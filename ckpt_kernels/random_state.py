"""The states of random number generators at the start of a layer's call, restored when the call is repeated.

Torch's generators for the CPU, for the devices of a call's tensors and within the layer; Python's; and numpy's.
"""

import contextlib
import ctypes
import random
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


class _OfTorch:
    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._state = generator, generator.get_state()

    def is_current(self) -> bool:
        return torch.equal(self._generator.get_state(), self._state)

    def restore(self) -> None:
        self._generator.set_state(self._state)


class _OfPython:
    def __init__(self) -> None:
        self._state = random.getstate()

    def is_current(self) -> bool:
        return random.getstate() == self._state

    def restore(self) -> None:
        random.setstate(self._state)


class _OfNumpy:
    """The state of numpy's global generator.

    numpy copies its state number by number, which takes as long as a small layer. So the state is compared in place, at
    the address that numpy publishes, if the bytes there were the state when it was read. Of two normal numbers made
    together numpy holds the second back, elsewhere; while it does so, numpy is asked.
    """

    def __init__(self) -> None:
        module: Any = sys.modules["numpy"].random
        self._random = module
        self._state = module.get_state(legacy=False)
        self._generator: Any = module.get_bit_generator() if hasattr(module, "get_bit_generator") else None
        self._bytes: bytes | None = None
        if type(self._generator) is module.MT19937 and not self._state["has_gauss"]:
            words, position = self._state["state"]["key"], self._state["state"]["pos"]
            state = words.tobytes() + int(position).to_bytes(4, sys.byteorder)
            self._address = self._generator.ctypes.state_address
            if ctypes.string_at(self._address, len(state)) == state:
                self._bytes = state

    def is_current(self) -> bool:
        if self._bytes is not None and self._random.get_bit_generator() is self._generator:
            return ctypes.string_at(self._address, len(self._bytes)) == self._bytes
        return _are_equal(self._random.get_state(legacy=False), self._state)

    def restore(self) -> None:
        self._random.set_state(self._state)


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
    def now(generators: Iterable[torch.Generator], before: "RandomState | None" = None) -> "RandomState":
        """The present state of these generators, Python's and numpy's. States of `before` that are current are used."""
        known = {} if before is None else before._states
        return RandomState({source: _state_of(source, known.get(source)) for source in _sources(generators)})

    def covers(self, generators: Iterable[torch.Generator]) -> bool:
        """Whether the states are those of at least these generators, Python's and numpy's."""
        return self._states.keys() >= _sources(generators)

    def is_current(self) -> bool:
        """Whether no random number has been drawn since."""
        return all(state.is_current() for state in self._states.values())

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which the generators have these states; afterwards the current states return."""
        current = {source: _state_of(source, state) for source, state in self._states.items()}
        for source, state in self._states.items():
            if current[source] is not state:
                state.restore()
        try:
            yield
        finally:
            for state in current.values():
                if not state.is_current():
                    state.restore()


def _sources(generators: Iterable[torch.Generator]) -> set[Any]:
    numpy = sys.modules.get("numpy")
    return {*generators, random, *(() if numpy is None else (numpy,))}


def _state_of(source: Any, known: _State | None) -> _State:
    """The present state of a generator: `known` if that is still current."""
    if known is not None and known.is_current():
        return known
    if source is random:
        return _OfPython()
    return _OfTorch(source) if isinstance(source, torch.Generator) else _OfNumpy()
