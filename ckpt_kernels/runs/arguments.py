"""Arguments of calls that will be repeated: which are allowed, how they are recorded, and how they are restored."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The allowed types of arguments: none that a layer can write to while others read the value.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Link(NamedTuple):
    """An argument that is an output of an earlier call of the run."""

    call: int
    output: int


class Input:
    """An argument that comes from outside of the run, and is kept.

    Args:
        tensor: the argument in the first pass.
        get: returns the tensor, or one of the same values that an outer context keeps instead.
    """

    def __init__(self, tensor: Tensor, get: Callable[[], Tensor]) -> None:
        self._get = get
        self._is_leaf = tensor.is_leaf
        # Parameters are known by their identity, and so are tensors without gradients, such as buffers.
        self._is_itself = isinstance(tensor, nn.Parameter) or not tensor.requires_grad
        # A layer may read attributes that the model has given to the tensor.
        self._attributes = {} if self._is_itself else dict(vars(tensor))

    def restored(self) -> Tensor:
        """The argument in the second pass: a parameter, or a tensor without gradients, itself; of any other tensor
        another object with the attributes that the first pass found, for the layer may hook or change these."""
        tensor = self._get()
        if self._is_itself:
            return tensor
        restored = tensor.detach().requires_grad_() if self._is_leaf else traced(tensor)
        vars(restored).update(self._attributes)
        return restored


Source = Link | Input


def are_plain(values: Sequence[Any]) -> bool:
    """Whether all values are dense tensors, numbers, strings, and plain tuples and dicts of these."""
    return next(not_plain_among(values), None) is None


def not_plain_among(values: Iterable[Any]) -> Iterator[type]:
    """The types of the values, and of those in plain tuples and dicts, that are none of these."""
    for value in values:
        if type(value) is tuple:
            yield from not_plain_among(value)
        elif type(value) is dict:
            yield from not_plain_among(value.values())
        elif not (isinstance(value, _PLAIN) or (isinstance(value, Tensor) and _is_dense(value))):
            yield type(value)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


class _RunInput(torch.autograd.Function):
    """The identity. In the second pass inputs have an autograd node, as in the first, but one that no recipe knows."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def traced(tensor: Tensor) -> Tensor:
    """A tensor of the same memory, with a node in the graph of the second pass."""
    return _RunInput.apply(tensor.detach().requires_grad_())


class Restored:
    """The tensors that repeated calls take: kept inputs, and outputs of earlier calls. Each is held until the last call
    that takes the tensor has run, as a model's own loop holds its tensors.

    Args:
        arguments: the recorded arguments of each call.
    """

    def __init__(self, arguments: Sequence[Sequence[Any]]) -> None:
        self._last = {source: number for number, values in enumerate(arguments) for source in _sources_among(values)}
        self._tensors: dict[Source, Tensor] = {}

    def argument(self, recorded: Any) -> Any:
        """Return an argument from its recorded form."""
        return with_sources(recorded, self.tensor)

    def tensor(self, source: Source) -> Tensor:
        """Return the tensor of a link, or of an input, which is asked for its tensor once."""
        if isinstance(source, Input) and source not in self._tensors:
            self._tensors[source] = source.restored()
        return self._tensors[source]

    def end_call(self, number: int, outputs: Sequence[Tensor]) -> None:
        """Hold the outputs of a call that later calls take, and drop the tensors that none takes."""
        for output, tensor in enumerate(outputs):
            self._tensors[Link(number, output)] = tensor
        self._tensors = {one: tensor for one, tensor in self._tensors.items() if self._last.get(one, -1) > number}


def with_sources(recorded: Any, replace: Callable[[Source], Any]) -> Any:
    """Return a recorded argument with all links and inputs replaced."""
    if isinstance(recorded, Link | Input):
        return replace(recorded)
    if isinstance(recorded, tuple):
        return tuple(with_sources(part, replace) for part in recorded)
    if isinstance(recorded, dict):
        return {key: with_sources(part, replace) for key, part in recorded.items()}
    return recorded


def _sources_among(values: Iterable[Any]) -> Iterator[Source]:
    for value in values:
        if isinstance(value, Link | Input):
            yield value
        elif isinstance(value, tuple):
            yield from _sources_among(value)
        elif isinstance(value, dict):
            yield from _sources_among(value.values())


def version_checked(tensor: Tensor, description: str = "an argument of a checkpointed layer") -> Callable[[], Tensor]:
    """A function that returns the tensor, or raises if the tensor has been written to, named by `description`."""
    version = version_of(tensor)
    tensor_kept = tensor if tensor.is_leaf else tensor.detach()

    def get() -> Tensor:
        if version is not None and tensor_kept._version != version:
            raise RuntimeError(
                f"{description}, {tensor_kept.dtype} {tuple(tensor_kept.shape)}, was modified by an in-place "
                f"operation since: it is at version {tensor_kept._version}; expected version {version}"
            )
        return tensor_kept

    return get


def version_of(tensor: Tensor) -> int | None:
    """The version of a tensor; None for an inference tensor, which has no version counter."""
    return None if tensor.is_inference() else tensor._version
