"""The bytes that a copy of a model keeps. The model, the inputs and all random number generators stay as they are."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..model_copies import copy_of, deep_copied
from ..target import arguments_of
from .saved import saved_bytes


def kept_bytes(model: nn.Module, inputs: Any, change: Callable[[nn.Module], object] | None = None) -> int:
    """The bytes that a forward pass of a copy of the model keeps, after a `change` of the copy.

    `inputs` is a tensor, a tuple, or a dict by name. The model, the inputs, and the random number generators of torch,
    Python and numpy stay as they are.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    with random_numbers_kept(), torch.inference_mode(False), torch.enable_grad():
        twin, (args, kwargs) = copy_of(model), arguments_of(inputs)
        memo: dict[int, Any] = {}
        args = tuple(deep_copied(value, memo) for value in args)
        kwargs = {name: deep_copied(value, memo) for name, value in kwargs.items()}
        if change is not None:
            change(twin)
        return saved_bytes(twin, *args, **kwargs)


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """A context after which torch's, Python's and numpy's generators continue as if none had states within."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
