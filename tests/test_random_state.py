"""The states of random number generators: every draw is seen, and a restored state gives the same numbers."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckpt_kernels.random_state import RandomState

numpy = pytest.importorskip("numpy")

# A Mersenne Twister makes 624 words at a time, after which its position is the same again.
DRAWS: dict[str, Callable[[], Any]] = {
    "one of torch": lambda: torch.rand(1).item(),
    "a normal of torch": lambda: torch.randn(1).item(),
    "624 of torch": lambda: torch.randint(0, 2**31, (624,), dtype=torch.int32).tolist(),
    "one of Python": random.random,
    "a normal of Python": lambda: random.gauss(0.0, 1.0),
    "624 of Python": lambda: [random.getrandbits(32) for _ in range(624)],
    "one of numpy": lambda: numpy.random.rand(),
    "a normal of numpy": lambda: numpy.random.standard_normal(),
    "624 of numpy": lambda: numpy.random.bytes(4 * 624),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_seen_and_restored(name: str) -> None:
    draw = DRAWS[name]
    for _ in range(3):
        before = RandomState.now((torch.default_generator,))
        assert before.is_current()
        drawn = draw()
        assert not before.is_current()
        after = RandomState.now((torch.default_generator,), before)
        with RandomState.kept((before,)):
            before.restore()
            assert before.is_current()
            assert draw() == drawn
            assert not before.is_current()
        assert after.is_current()


def test_a_state_without_draws_is_kept_by_a_context() -> None:
    state = RandomState.now((torch.default_generator,))
    with RandomState.kept((state,)):
        state.restore()
        torch.rand(3)
        random.random()
    assert state.is_current()


def test_a_generator_of_numpys_other_kinds_is_compared_as_a_whole() -> None:
    generator = numpy.random.get_bit_generator()
    try:
        numpy.random.set_bit_generator(numpy.random.PCG64(3))
        before = RandomState.now((torch.default_generator,))
        assert before.is_current()
        drawn = numpy.random.rand()
        assert not before.is_current()
        with RandomState.kept((before,)):
            before.restore()
            assert numpy.random.rand() == drawn
    finally:
        numpy.random.set_bit_generator(generator)


def test_another_generator_of_numpy_is_seen() -> None:
    generator = numpy.random.get_bit_generator()
    before = RandomState.now((torch.default_generator,))
    try:
        numpy.random.set_bit_generator(numpy.random.MT19937(7))
        assert not before.is_current()
        after = RandomState.now((torch.default_generator,), before)
        with RandomState.kept((before,)):
            before.restore()
            drawn = numpy.random.rand()
        assert after.is_current()
    finally:
        numpy.random.set_bit_generator(generator)
    assert before.is_current() and numpy.random.rand() == drawn
