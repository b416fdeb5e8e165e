"""Trying out what a module computes: on a stand-in of its own, never on the module.

A stand-in has the module's class, plain settings, and random parameters; nothing that it does reaches the module, its
buffers, or anybody's random numbers. Which modules may be tried out is for `code.reached` to say. A trial ends at the
first operation that is not on the list of those allowed: a random number, a decision by value, a part of a tensor.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..code.reached import Code, NotTried, Settings, has_finalizer, read
from ..code.remembering import remembered

# What may run in a trial, by the names of torch's operations: of one element at a time, and for norms. (Autograd
# detaches the results that it keeps; what a forward detaches is seen by its gradient.)
POINTWISE = frozenset(
    """add detach div elu erf gelu hardswish hardtanh leaky_relu mish mul neg pow relu rsub sigmoid silu softplus sub
    tanh""".split()
)
ROWS = frozenset(
    """_fused_rms_norm _to_copy add clamp_min detach div expand linalg_vector_norm mean mul native_layer_norm neg pow
    rsqrt rsub sqrt sub sum var""".split()
)
CHANNELS = ROWS | frozenset("alias clone permute slice transpose unsqueeze view".split())


Tried = TypeVar("Tried")

# Below which a norm may be cut off, as F.normalize does it.
_NEARLY_ZERO = 1e-11


class DoesNotTake(NotTried):
    """It fails on what it was tried with."""


class Outline(NamedTuple):
    """What a stand-in has of a module: its class, its code, its settings, and its parameters' names and shapes."""

    kind: type[nn.Module]
    forward: Any
    code: Code
    settings: Settings
    shapes: tuple[tuple[str, torch.Size | None], ...]

    @property
    def parameters(self) -> dict[str, torch.Size]:
        """Those that are there."""
        return {name: shape for name, shape in self.shapes if shape is not None}

    def stand_in(self, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
        """A module with random parameters of that dtype, on the CPU."""
        made = object.__new__(self.kind)
        made.__dict__.update(nn.Module().__dict__ | dict(self.settings))
        for name, shape in self.shapes:
            values = None if shape is None else torch.rand(shape, generator=generator, device="cpu") + 0.5
            made.__dict__["_parameters"][name] = None if values is None else nn.Parameter(values.to(dtype))
        return made


def outline_of(module: nn.Module, gradients: bool = False) -> Outline:
    """Raises NotTried where the module may not be tried out: without its `gradients`, if it has any of its own."""
    if has_finalizer(type(module)):
        raise NotTried("has a finalizer, which would run for what it is tried out on")
    shapes = tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())
    settings, code = read(module, gradients)
    return Outline(type(module), type(module).forward, code, settings, shapes)


class Watching(TorchDispatchMode):
    """A mode of a trial."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiles in a trial's thread: of what keeps the compiler away each operation would pay for."""
        return False


class _Strict(Watching):
    """Ends the trial of what runs anything but these operations, or reduces over a dimension that is not counted from
    the last, or in `dimensions`."""

    def __init__(self, allowed: frozenset[str], dimensions: tuple[int, ...]) -> None:
        super().__init__()
        self._allowed = allowed
        self._dimensions = dimensions
        self._is_suspended = False

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """For what torch makes up of other operations where it has none that does the whole."""
        self._is_suspended = True
        try:
            yield
        finally:
            self._is_suspended = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_suspended:
            return func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotTried("draws random numbers")
        if torch.Tag.data_dependent_output in func.tags:
            raise NotTried("decides by the values of what it is given")
        name = func.overloadpacket.__name__
        if name not in self._allowed:
            raise NotTried(f"computes with {name.strip('_')}, which is in none of ours")
        if name == "slice" and not _is_whole(*args[1:]):
            raise NotTried("computes with a part of what it is given")
        if name == "clamp_min" and args[1] > _NEARLY_ZERO:
            raise NotTried("is cut off")
        if name in ("linalg_vector_norm", "mean", "sum", "var"):
            over = next((given for given in args[1:] if isinstance(given, list | tuple)), None)
            if over is None or any(dimension not in self._dimensions for dimension in over):
                raise NotTried("reduces over other dimensions than a norm of ours")
        return func(*args, **(kwargs or {}))


class _StrictCalls(TorchFunctionMode):
    """Ends the trial of what asks for the name of a tensor's type, which is another on another device, or casts to more
    than a dtype: to a device, say."""

    def __init__(self, operations: _Strict) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.type or func is torch.Tensor.to:
            given = (*args[1:], *(kwargs or {}).values())
            if not given or not all(isinstance(value, _CAST_TO) for value in given):
                raise NotTried("asks for the type of what it is given, or casts to more than a dtype")
        if func is nn.functional.rms_norm:
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise DoesNotTake("takes an input and a weight of two dtypes")
            with self._operations.suspended():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_CAST_TO = (torch.dtype, torch.Tensor, bool)


def _is_whole(dimension: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    """Whether a slice is `:`, of whatever length."""
    return start in (None, 0) and end in (None, 2**63 - 1) and step == 1


def in_a_thread_of_its_own(trial: Callable[..., Tried]) -> Callable[..., Tried]:
    """For trials: torch as it is by default. What is set around a conversion, grad mode, autocast, a default device,
    modes, hooks of saved tensors, is set for the thread that it runs in."""

    @functools.wraps(trial)
    def run(*arguments: Any) -> Tried:
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(trial, *arguments).result()

    return run


def forward_of(
    module: nn.Module, input: torch.Tensor, allowed: frozenset[str], dimensions: tuple[int, ...] = ()
) -> torch.Tensor:
    """What the stand-in computes; raises NotTried where that is no tensor, or no trial."""
    return result_of(functools.partial(type(module).forward, module), input, allowed, dimensions)


def result_of(
    function: Callable[[torch.Tensor], Any],
    input: torch.Tensor,
    allowed: frozenset[str],
    dimensions: tuple[int, ...] = (),
) -> torch.Tensor:
    """The same of a function."""
    try:
        with _Strict(allowed, dimensions) as operations, _StrictCalls(operations):
            output = function(input)
    except NotTried:
        raise
    except Exception as error:
        raise DoesNotTake(f"fails on a tensor of {tuple(input.shape)}") from error
    if type(output) is not torch.Tensor:
        raise NotTried("makes something else than a tensor")
    return output


@remembered
def takes_one(function: Any, bound: int = 1) -> bool:
    """Whether it can be called with one argument beside those that are bound, as a method's first is."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(required) == 1 and required[0].kind in (required[0].POSITIONAL_ONLY, required[0].POSITIONAL_OR_KEYWORD)
