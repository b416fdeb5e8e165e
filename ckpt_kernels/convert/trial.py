"""Trying out what a module computes: on a stand-in of its own, never on the module.

A stand-in has the module's class, plain settings, and random parameters; nothing that it does reaches the module, its
buffers, or anybody's random numbers. Only a module is tried out whose code, as far as it is reached from its forward,
reads nothing but its parameters and plain settings, writes to nothing, and decides nothing by shape; and a trial that
asks for a random number or for the value of a tensor ends there.
"""

import builtins
import contextlib
import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Settings = tuple[tuple[str, Any], ...]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
_BUILTINS = """float int len list max min range sum super tuple NotImplementedError RuntimeError TypeError ValueError
    AssertionError""".split()
_WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR", "IMPORT_NAME")
_SHAPES = {"shape", "size", "len"}
# What code may name of tensors and of torch: arithmetic, and what norms are written with.
_NAMES = frozenset(
    """Tensor add bfloat16 bias contiguous div dtype elu erf float float16 float32 forward functional gelu hardswish
    layer_norm leaky_relu math mean mish movedim mul neg nn normalized_shape permute pi pow relu rms_norm rsqrt shape
    sigmoid silu size softplus sqrt square std sub sum tanh to torch transpose type_as unsqueeze var view
    weight""".split()
)
# What may run in a trial, by the names of torch's operations: of one element at a time, and for norms. (Autograd
# detaches the results that it keeps; what a forward detaches is seen by its gradient.)
POINTWISE = frozenset(
    "add detach div elu erf gelu hardswish leaky_relu mish mul neg pow relu rsub sigmoid silu softplus sub tanh".split()
)
ROWS = POINTWISE - {"relu", "leaky_relu", "elu"} | frozenset(
    "_fused_rms_norm _to_copy mean native_layer_norm rsqrt sqrt sum var".split()
)
CHANNELS = ROWS | frozenset("alias clone permute slice transpose unsqueeze view".split())


class NotTried(Exception):
    """Why a module cannot be tried out; for people."""


class DoesNotTake(NotTried):
    """It fails on what it was tried with."""


class Code:
    """The globals, and the methods of a class, that a forward reaches, with what they were when it was tried out.

    A copy is the same; where it is unpickled, it is what the class has there.
    """

    def __init__(self, kind: type[nn.Module], found: Iterable[tuple[Any, str, Any]]) -> None:
        self.kind = kind
        self._found = tuple(found)

    def is_same(self) -> bool:
        """Whether all of it still is what it was."""
        for holder, name, value in self._found:
            if (holder.get(name, value) if type(holder) is dict else getattr(holder, name, None)) is not value:
                return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        return tuple((id(holder), name, id(value)) for holder, name, value in self._found)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Code":
        return self

    def __reduce__(self) -> tuple:
        return _code_of, (self.kind,)


def _code_of(kind: type[nn.Module]) -> Code:
    made = object.__new__(kind)
    made.__dict__.update(nn.Module().__dict__)
    reading = _Reading(made)
    try:
        reading.function(kind.forward, own=True)
    except NotTried:
        return Code(kind, [({}, "", None)])
    return Code(kind, reading.found)


def _read(module: nn.Module) -> tuple[Settings, Code]:
    """All that the module's forward reads of it beside its parameters, by name, and the code it reaches."""
    reading = _Reading(module)
    reading.function(type(module).forward, own=True)
    if reading.branches and reading.names & _SHAPES:
        raise NotTried("decides by the shape of what it is given")
    return tuple(sorted(reading.settings.items())), Code(type(module), reading.found)


def is_as_tried(module: nn.Module, settings: Settings, code: Code | None) -> bool:
    """Whether the module's settings, and the code it reaches, are what they were."""
    held = module.__dict__
    for name, value in settings:
        if held.get(name, _MISSING) != value:
            return False
    return code is None or code.is_same()


_MISSING = object()


class _Reading:
    """What the code reached from a module's forward reads and does."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.settings: dict[str, Any] = {}
        self.names: set[str] = set()
        self.branches = False
        self.found: list[tuple[Any, str, Any]] = []
        self._seen: set[types.CodeType] = set()

    def function(self, function: Any, own: bool = False) -> None:
        """Of a function of Python's; those of torch, but for the module's own methods, need not be read."""
        if isinstance(function, staticmethod | classmethod | functools.partial):
            function = getattr(function, "__func__", None) or function.func
        if _is_torchs(function) and not own:
            return
        if not isinstance(function, types.FunctionType):
            raise NotTried(
                f"calls {getattr(function, '__name__', repr(function))}, which is no function of Python's or torch's"
            )
        for cell in function.__closure__ or ():
            value = cell.cell_contents
            if value is not self.module and not isinstance(value, type):
                if not callable(value):
                    raise NotTried("reads a variable of the function around it")
                self.function(value)
        self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        if code in self._seen:
            return
        self._seen.add(code)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names)
        for step in dis.get_instructions(code):
            if step.opname in _WRITES:
                raise NotTried("writes as it goes")
            self.branches |= "JUMP_IF" in step.opname or step.opname == "FOR_ITER"
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._global(step.argval, names)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                self._attribute(step.argval)

    def _global(self, name: str, names: dict[str, Any]) -> None:
        self.names.add(name)
        if name in names:
            self.found.append((names, name, names[name]))
            self._value(names[name])
        elif name not in _BUILTINS or not hasattr(builtins, name):
            raise NotTried(f"names {name}, which is not on the list of what is known")

    def _value(self, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            if value.__name__ != "math" and value.__name__.partition(".")[0] != "torch":
                raise NotTried(f"uses {value.__name__}")
        elif isinstance(value, type):
            if not _is_torchs(value) and not issubclass(value, Exception):
                raise NotTried(f"uses the class {value.__name__}")
        elif not isinstance(value, _PLAIN):
            self.function(value)

    def _attribute(self, name: str) -> None:
        self.names.add(name)
        module = self.module
        if name == "training" or name in module._buffers:
            raise NotTried("depends on its mode or on buffers")
        if name in module.__dict__:
            value = module.__dict__[name]
            if isinstance(value, types.FunctionType | types.BuiltinFunctionType | functools.partial):
                self.function(value)
            elif not _is_plain(value):
                raise NotTried(f"reads {name}, which is no plain setting")
            self.settings[name] = tuple(value) if type(value) is list else value
        elif name not in module._parameters:
            # What a class inherits may be called by super().
            owners = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
            holders = [owner for owner in owners if name in vars(owner)]
            for owner in holders:
                held = vars(owner)[name]
                if _is_plain(held):
                    raise NotTried(f"reads {name} of its class")
                self.found.append((owner, name, getattr(owner, name)))
                self.function(held, own=True)
            if not holders and name not in _NAMES:
                raise NotTried(f"names {name}, which is not on the list of what is known")


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (type(value) in (tuple, list) and all(isinstance(v, int) for v in value))


def _is_torchs(function: Any) -> bool:
    named = getattr(function, "__module__", None) or getattr(getattr(function, "__self__", None), "__name__", "")
    return callable(function) and str(named).partition(".")[0] in ("torch", "math")


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
            if shape is not None:
                shape = nn.Parameter((torch.rand(shape, generator=generator, device="cpu") + 0.5).to(dtype))
            made.__dict__["_parameters"][name] = shape
        return made


def outline_of(module: nn.Module) -> Outline:
    """Raises NotTried where the module may not be tried out."""
    shapes = tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())
    settings, code = _read(module)
    return Outline(type(module), type(module).forward, code, settings, shapes)


class _Strict(TorchDispatchMode):
    """Ends the trial of what runs anything but these operations, or reduces over a dimension that is not counted from
    the last, or in `dimensions`."""

    def __init__(self, allowed: frozenset[str], dimensions: tuple[int, ...]) -> None:
        super().__init__()
        self._allowed = allowed
        self._dimensions = dimensions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotTried("draws random numbers")
        if torch.Tag.data_dependent_output in func.tags:
            raise NotTried("decides by the values of what it is given")
        name = func.overloadpacket.__name__
        if name not in self._allowed:
            raise NotTried(f"computes with {name.strip('_')}, which is in none of ours")
        if name in ("mean", "sum", "var"):
            over = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else None
            if over is None or any(dimension not in self._dimensions for dimension in over):
                raise NotTried("reduces over other dimensions than a norm of ours")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """For trials: torch as it is by default, whatever is set around them."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else contextlib.nullcontext(),
        contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
    ):
        yield


def forward_of(
    module: nn.Module, input: torch.Tensor, allowed: frozenset[str], dimensions: tuple[int, ...] = ()
) -> torch.Tensor:
    """What the stand-in computes; raises NotTried where that is no tensor, or no trial."""
    try:
        with _Strict(allowed, dimensions):
            output = type(module).forward(module, input)
    except NotTried:
        raise
    except Exception as error:
        raise DoesNotTake(f"fails on a tensor of {tuple(input.shape)}") from error
    if type(output) is not torch.Tensor:
        raise NotTried("makes something else than a tensor")
    return output


@functools.cache
def takes_one(forward: Any) -> bool:
    """Whether it can be called with one argument."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(required) == 1 and required[0].kind in (required[0].POSITIONAL_ONLY, required[0].POSITIONAL_OR_KEYWORD)
