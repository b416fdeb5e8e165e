"""Finds the parameters that a model's own forward writes to, such as a codebook that follows the data."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..nested_values import tensors_in

_PLAIN = (Tensor, nn.Parameter)


def parameters_written_by(forward: Callable[[], Any], parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Runs a forward pass, and returns the parameters whose memory torch's ops wrote to, with their values put back.

    Writes by other libraries, such as numpy, are not seen, nor are writes to subclasses of tensors.
    """
    watch = _Watch([p for p in parameters if type(p) in _PLAIN and p.layout is torch.strided])
    try:
        with watch, _without_compilers():
            forward()
    finally:
        for parameter, values in watch.before:
            parameter.data.copy_(values)
    return [parameter for parameter, _ in watch.before]


def _without_compilers() -> AbstractContextManager[Any]:
    """A context in which compiled parts run in eager mode: they would be compiled anew for the mode."""
    # Without torch's compiler, whose import takes seconds, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class _Watch(TorchDispatchMode):
    """Copies a parameter before an op writes to the parameter's memory for the first time.

    Attributes:
        before: the parameters that were written to, with copies of their values.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.before: list[tuple[nn.Parameter, Tensor]] = []
        self._unwritten: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            self._unwritten.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Operators such as `torch.cond` have no schema, and call others, which are seen.
        if hasattr(func, "_schema") and func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[index] if index < len(args) else kwargs.get(argument.name)
                    for tensor in tensors_in(value):
                        self._begin_write(tensor)
        return func(*args, **kwargs)

    def _begin_write(self, tensor: Tensor) -> None:
        if tensor.layout is torch.strided and type(tensor) in _PLAIN:
            for parameter in self._unwritten.pop(tensor.untyped_storage()._cdata, ()):
                self.before.append((parameter, parameter.detach().clone()))
