"""Trials: runs a stand-in of a module on small inputs, to learn the function that the module computes.

A stand-in has the module's class, plain settings, and random parameters. A trial reaches neither the module nor any
buffer nor torch's random state. `code.reachability` decides which modules may be tried. A trial ends at the first
operation that is not in a list of allowed ones, such as a random number, a branch on values, or a slice of a tensor.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..code.memoization import memoized
from ..code.reachability import read_forward
from ..code.settings import Settings, bare_module
from ..code.snapshots import CodeSnapshot, NotTriable, has_finalizer

# The operations allowed in trials of activations and of norms, by torch's names. "detach" is allowed because autograd
# detaches the results that it saves; the gradient shows where a forward itself detaches.
POINTWISE = frozenset(
    """add detach div elu erf gelu hardswish hardtanh leaky_relu mish mul neg pow relu rsub sigmoid silu softplus sub
    tanh""".split()
)
ROWS = frozenset(
    """_fused_rms_norm _to_copy add clamp_min detach div expand linalg_vector_norm mean mul native_layer_norm neg pow
    rsqrt rsub sqrt sub sum var""".split()
)
CHANNELS = ROWS | frozenset("alias clone permute slice transpose unsqueeze view".split())
# Of the activations those whose results autocast leaves in the input's dtype, and the ways to take parts of a tensor.
GATES = frozenset(
    """_to_copy add alias clamp clamp_max clamp_min detach div elu erf gelu hardswish hardtanh leaky_relu mish mul neg
    relu rsub sigmoid silu slice split split_with_sizes sub tanh unbind view""".split()
)


Result = TypeVar("Result")

# Parameters are random over so many powers of two above and below 1; products of more do not fit float16.
_SPREAD = 3
# One of so many elements of a parameter is zero.
_PARTS_ZERO = 8
# The largest lower bound of a norm that is allowed; F.normalize has 1e-12.
_NEARLY_ZERO = 1e-11


class InputRefused(NotTriable):
    """The stand-in fails on the inputs of the trial."""


class Outline(NamedTuple):
    """The parts of a module that a stand-in is made from.

    These are the class and its forward, all code and globals that the forward reaches, the plain attributes that it
    reads, and the names and shapes of the parameters, None for a parameter that is None.
    """

    kind: type[nn.Module]
    forward: Any
    code: CodeSnapshot
    settings: Settings
    shapes: tuple[tuple[str, torch.Size | None], ...]

    @property
    def parameters(self) -> dict[str, torch.Size]:
        """Names and shapes of the parameters that are not None."""
        return {name: shape for name, shape in self.shapes if shape is not None}

    def stand_in(
        self, dtype: torch.dtype, generator: torch.Generator | None = None, spread: int = _SPREAD
    ) -> nn.Module:
        """A module with random parameters of that dtype, on the CPU: see `_random_parameter`."""
        generator = generator or torch.Generator("cpu").manual_seed(0)
        module = bare_module(self.kind, self.settings)
        for name, shape in self.shapes:
            values = None if shape is None else _random_parameter(shape, generator, spread).to(dtype)
            module.__dict__["_parameters"][name] = None if values is None else nn.Parameter(values)
        return module


def _random_parameter(shape: torch.Size, generator: torch.Generator, spread: int) -> Tensor:
    """Numbers of both signs over `2 * spread` powers of two, and zeros among them, so that any function of a parameter
    differs from the parameter."""
    signed = torch.rand(shape, generator=generator, device="cpu") * 2 - 1
    exponents = torch.randint(-spread, spread + 1, shape, generator=generator, device="cpu")
    are_zero = torch.randint(_PARTS_ZERO, shape, generator=generator, device="cpu") == 0
    return torch.ldexp(signed + signed.sign(), exponents).masked_fill(are_zero, 0.0)


def outline_of(module: nn.Module, gradients: bool = False, every_dtype: bool = False) -> Outline:
    """The outline of a module. Raises NotTriable where the module must not be tried.

    An `autograd.Function` in the module's code is allowed only with `gradients`, by callers that try gradients too, and
    a decision by the dtype only with `every_dtype`, by callers that try each dtype.
    """
    if has_finalizer(type(module)):
        raise NotTriable("has a finalizer, which a trial would run")
    shapes = tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())
    settings, code = read_forward(module, gradients, every_dtype)
    return Outline(type(module), type(module).forward, code, settings, shapes)


class TrialMode(TorchDispatchMode):
    """A dispatch mode that is active during a trial."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Always False: nothing compiles in a trial's thread, and disabling the compiler would slow each operation."""
        return False


class _OperationsByName(TrialMode):
    """Ends the trial at any operation that is not `allowed`, and at any reduction over other dimensions than
    `dimensions`. Parts of dimensions and clamps count only `of_parts`."""

    def __init__(self, allowed: frozenset[str], dimensions: tuple[int, ...], of_parts: bool) -> None:
        super().__init__()
        self._allowed = allowed
        self._dimensions = dimensions
        self._of_parts = of_parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise NotTriable("decides by the values of its input")
        name = func.overloadpacket.__name__
        if name not in self._allowed:
            raise NotTriable(f"computes with {name.strip('_')}, which no fused function does")
        if name == "slice" and not self._of_parts and not _is_whole(*args[1:]):
            raise NotTriable("computes with a slice of its input")
        if name == "clamp_min" and not self._of_parts and args[1] > _NEARLY_ZERO:
            raise NotTriable("clamps the norm from below")
        if name in ("linalg_vector_norm", "mean", "sum", "var"):
            reduced = next((argument for argument in args[1:] if isinstance(argument, list | tuple)), None)
            if reduced is None or any(dimension not in self._dimensions for dimension in reduced):
                raise NotTriable("reduces over other dimensions than our norms do")
        return func(*args, **(kwargs or {}))


class _AllowedCalls(TorchFunctionMode):
    """Ends the trial where code reads the name of a tensor's type, which depends on the device, or casts to more than a
    dtype, for example to a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.type or func is Tensor.to:
            arguments = (*args[1:], *(kwargs or {}).values())
            if not arguments or not all(isinstance(value, _CAST_TO) for value in arguments):
                raise NotTriable("reads the type of its input, or casts to more than a dtype")
        if func is nn.functional.rms_norm or func is torch.rms_norm:
            tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise InputRefused("takes an input and a weight of two dtypes")
            # Torch composes the function of several operations where no single kernel exists.
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_CAST_TO = (torch.dtype, Tensor, bool)


def _is_whole(dimension: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    """Whether the arguments of a slice select a whole dimension."""
    return start in (None, 0) and end in (None, 2**63 - 1) and step == 1


def in_own_thread(trial: Callable[..., Result]) -> Callable[..., Result]:
    """A decorator that runs a trial in a new thread, where torch has its default state.

    Grad mode, autocast, default device, modes and saved-tensor hooks around a conversion are set for its thread only.
    Warnings about the sample inputs are not the user's.
    """

    @functools.wraps(trial)
    def run(*arguments: Any) -> Result:
        with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=1) as thread:
            warnings.simplefilter("ignore")
            return thread.submit(trial, *arguments).result()

    return run


def count_apart(results: Tensor, expected: Tensor, bound: float) -> int:
    """The number of elements that differ from the expected ones in float64 by more than this bound."""
    return int((~torch.isclose(results.double(), expected, rtol=bound, atol=bound)).sum())


@contextlib.contextmanager
def recording_saved_tensors() -> Iterator[Callable[[Tensor], bool]]:
    """A context with a function that tells whether autograd has saved the storage of a tensor within the context."""
    with recording_saved_storages() as storages:
        yield lambda tensor: tensor.untyped_storage()._cdata in storages


@contextlib.contextmanager
def recording_saved_storages() -> Iterator[set[int]]:
    """A context with the addresses of the storages that autograd has saved within the context."""
    storages: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage()._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        yield storages


def result_of(
    function: Callable[[Tensor], Any],
    input: Tensor,
    allowed: frozenset[str],
    dimensions: tuple[int, ...] = (),
    of_parts: bool = False,
) -> Tensor:
    """The function of a tensor, or `of_parts` of it, which may be clamped.

    Raises NotTriable where an operation is not among the `allowed` names, a reduction is over other `dimensions`, or
    the result is no tensor.
    """
    try:
        with _OperationsByName(allowed, dimensions, of_parts), _AllowedCalls():
            output = function(input)
    except NotTriable:
        raise
    except Exception as error:
        raise InputRefused(f"fails on a tensor of {tuple(input.shape)}") from error
    if type(output) is not Tensor:
        raise NotTriable("returns something else than a tensor")
    return output


@memoized
def takes_one_argument(function: Any, bound: int = 1) -> bool:
    """Whether the function can be called with one argument, after `bound` arguments such as a method's self."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(required) == 1 and required[0].kind in (required[0].POSITIONAL_ONLY, required[0].POSITIONAL_OR_KEYWORD)
