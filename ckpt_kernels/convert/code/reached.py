"""What the code of a module reads and reaches from its forward: whether it may be tried out at all.

It may if it reads nothing but parameters and plain settings, writes to nothing, names nothing that is not on a list,
and decides nothing by shape. What was read and reached is kept, so that a call can ask whether it still is the same.
"""

import builtins
import contextlib
import dis
import functools
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..asked import MISSING, Found, are_same
from .called import is_a, is_torchs
from .dead import live_code
from .own_gradients import METHODS, NAMES, is_plain_function

Settings = tuple[tuple[str, Any], ...]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
_BUILTINS = """any float int len list max min range str sum super tuple NotImplementedError RuntimeError TypeError
    ValueError AssertionError""".split()
WRITES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR", "IMPORT_NAME")
_SHAPES = {"shape", "size", "len"}
_STEPS = ("int", "max", "min")
# What code may name of tensors and of torch: arithmetic, and what norms are written with.
_NAMES = frozenset(
    """Tensor add bfloat16 bias contiguous div dtype elu erf float float16 float32 forward functional gelu hardswish
    hardtanh layer_norm leaky_relu math mean mish movedim mul neg nn normalize normalized_shape permute pi pow relu
    relu6 rms_norm rsqrt shape sigmoid silu size softplus sqrt square std sub sum tanh to torch transpose type type_as
    unsqueeze var view weight""".split()
)


class NotTried(Exception):
    """Why a module cannot be tried out; for people."""


class Code:
    """All that a forward reaches, with what it was when it was tried out: globals, functions of torch's modules, the
    methods of a class, variables of functions around, and defaults.

    A copy is the same; where it is unpickled, it is what a module of the class, with those settings and parameters, has
    there.
    """

    def __init__(self, module: tuple[type[nn.Module], Settings, tuple[str, ...]], found: Iterable[Found]) -> None:
        self._module = module
        self.found = tuple({(id(holder), name): (holder, name, value) for holder, name, value in found}.values())

    def is_same(self) -> bool:
        """Whether all of it still is what it was."""
        return are_same(self.found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        return tuple((id(holder), name, id(value)) for holder, name, value in self.found)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Code":
        return self

    def __reduce__(self) -> tuple:
        return _code_of, (*self._module, self.text())

    def text(self) -> tuple[str, ...]:
        """What was found, for another process: functions by their code, plain values, and the names of all else."""
        return tuple(f"{name}: {_text(value)}" for _, name, value in self.found)


def _text(value: Any) -> str:
    if isinstance(value, types.FunctionType):
        return _text(value.__code__)
    if isinstance(value, types.CodeType):
        inner = [_text(constant) for constant in value.co_consts]
        return f"{value.co_code.hex()} {value.co_names} {inner}"
    if isinstance(value, tuple):
        return str([_text(part) for part in value])
    return repr(value) if isinstance(value, _PLAIN) else getattr(value, "__qualname__", type(value).__qualname__)


def _code_of(kind: type[nn.Module], settings: Settings, parameters: tuple[str, ...], text: tuple[str, ...]) -> Code:
    if has_finalizer(kind):
        return _never_the_same(kind, settings, parameters)
    made = object.__new__(kind)
    made.__dict__.update(nn.Module().__dict__ | dict(settings))
    made.__dict__["_parameters"] = dict.fromkeys(parameters)
    with contextlib.suppress(NotTried):
        found = read(made, gradients=True)[1]
        if found.text() == text:
            return found
    return _never_the_same(kind, settings, parameters)


def _never_the_same(*module: Any) -> Code:
    return Code(module, [({}, "", None)])


def has_finalizer(kind: type) -> bool:
    """Whether something runs at the end of an object of that class, whoever made it."""
    return hasattr(kind, "__del__")


def read(module: nn.Module, gradients: bool = False) -> tuple[Settings, Code]:
    """All that the module's forward reads of it beside its parameters, by name, and the code it reaches, with what has
    gradients of its own if whoever tries it out tries those out too."""
    reading = Reading(module, gradients)
    reading.function(type(module).forward, own=True)
    if reads_shapes(reading):
        raise NotTried("decides by the shape of what it is given")
    reading.modules()
    settings = tuple(sorted(reading.settings.items()))
    return settings, Code((type(module), settings, tuple(module._parameters)), reading.found)


def reads_shapes(reading: "Reading") -> bool:
    """Whether what the code does may depend on the shapes of what it is given."""
    return bool(reading.names & _SHAPES) and (reading.branches or reading.steps)


def is_as_tried(module: nn.Module, settings: Settings, code: Code | None) -> bool:
    """Whether the module's settings, and the code it reaches, are what they were."""
    held = module.__dict__
    for name, value in settings:
        now = _setting(held.get(name, MISSING))
        if type(now) is not type(value) or now != value:
            return False
    return code is None or code.is_same()


def _setting(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


class Reading:
    """What the code reached from a module's forward reads and does."""

    writes: tuple[str, ...] = WRITES

    def __init__(self, module: nn.Module, gradients: bool = False) -> None:
        self.module = module
        self._gradients = gradients
        self._known = _NAMES
        self.settings: dict[str, Any] = {}
        self.names: set[str] = set()
        self.branches = False
        # Whether it computes what has steps, of numbers such as a shape's.
        self.steps = False
        self.found: list[Found] = []
        self._seen: set[types.CodeType] = set()

    def function(self, function: Any, own: bool = False) -> None:
        """Of a function of Python's; those of torch, but for the module's own methods, need not be read."""
        if isinstance(function, staticmethod | classmethod | functools.partial):
            function = function.func if isinstance(function, functools.partial) else function.__func__
        if is_torchs_own(function) and not own:
            return
        if not isinstance(function, types.FunctionType):
            raise NotTried(
                f"calls {getattr(function, '__name__', repr(function))}, which is no function of Python's or torch's"
            )
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                raise NotTried("reads a variable that has no value yet") from None
            if value is not self.module and not isinstance(value, type):
                if not callable(value):
                    raise NotTried("reads a variable of the function around it")
                self.found.append((cell, "cell_contents", value))
                self.function(value)
        if not all(map(_is_constant, function.__defaults__ or ())) or function.__kwdefaults__:
            raise NotTried("has defaults that may change")
        self.found += [(function, name, getattr(function, name)) for name in ("__code__", "__defaults__")]
        code, held = live_code(function)
        self.found += held
        self._code(code, function.__globals__)

    def modules(self) -> None:
        """What the code may reach of torch's modules, by the names in it."""
        waiting = [value for _, _, value in self.found if isinstance(value, types.ModuleType)]
        reached = set()
        while waiting:
            held = vars(waiting.pop())
            if id(held) not in reached:
                reached.add(id(held))
                for name in sorted(self.names & held.keys()):
                    self.found.append((held, name, held[name]))
                    if isinstance(held[name], types.ModuleType):
                        waiting.append(held[name])

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        if code in self._seen:
            return
        self._seen.add(code)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names)
            self.constant(constant)
        steps = list(dis.get_instructions(code))
        for index, step in enumerate(steps):
            if step.opname in self.writes:
                raise NotTried("writes as it goes")
            if step.opname in ("BUILD_SLICE", "BINARY_SLICE"):
                count = step.arg or 0 if step.opname == "BUILD_SLICE" else 2
                self.bounds(steps[max(0, index - count) : index])
            self.branches |= ("JUMP_" in step.opname and "_IF_" in step.opname) or step.opname == "FOR_ITER"
            self.steps |= step.opname.startswith("BINARY_") and step.argrepr.rstrip("=") in ("//", "%")
            self.steps |= step.opname == "COMPARE_OP" or step.argval in _STEPS
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.named(step.argval, names)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                self.attribute(step.argval)

    def constant(self, value: Any) -> None:
        """Of the code."""
        if isinstance(value, slice) and value != slice(None):
            raise NotTried("computes with a part of what it is given")

    def bounds(self, loads: Sequence[dis.Instruction]) -> None:
        """Of a slice: what loads them, and its step if it has one. One beyond what is tried would not be seen."""
        if any(load.opname != "LOAD_CONST" or load.argval is not None for load in loads):
            raise NotTried("computes with a part of what it is given")

    def named(self, name: str, names: dict[str, Any]) -> None:
        self.names.add(name)
        if name in names:
            self.found.append((names, name, names[name]))
            self.value(names[name])
        elif name not in _BUILTINS or not hasattr(builtins, name):
            raise NotTried(f"names {name}, which is not on the list of what is known")
        else:
            self.found.append((names, name, MISSING))

    def value(self, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            if value.__name__ != "math" and value.__name__.partition(".")[0] != "torch":
                raise NotTried(f"uses {value.__name__}")
        elif self._gradients and isinstance(value, type) and is_plain_function(value):
            self._known |= NAMES
            for method in METHODS:
                self.found.append((value, method, getattr(value, method)))
                self.function(getattr(value, method), own=True)
        elif isinstance(value, type):
            if not is_torchs_own(value) and not issubclass(value, Exception):
                raise NotTried(f"uses the class {value.__name__}")
        elif not isinstance(value, _PLAIN):
            self.function(value)

    def attribute(self, name: str) -> None:
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
            self.settings[name] = _setting(value)
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
            if not holders and name not in self._known:
                raise NotTried(f"names {name}, which is not on the list of what is known")


def _is_plain(value: Any) -> bool:
    return _is_constant(_setting(value))


def _is_constant(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(isinstance(v, int) for v in value))


def is_torchs_own(function: Any) -> bool:
    named = getattr(function, "__module__", None) or getattr(getattr(function, "__self__", None), "__name__", "")
    in_its_files = not is_a(function, types.FunctionType) or is_torchs(function)
    return callable(function) and in_its_files and str(named).partition(".")[0] in ("torch", "math")
