"""Reachability analysis of a module's forward: whether the module may be tried out on sample inputs.

A trial shows what the forward computes if the forward reads only parameters and plain settings, writes to nothing,
names only what is on a list, and takes no decision by shape or dtype.
"""

import builtins
import dis
import functools
import types
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.autograd import Function

from ...activations import FUNCTION_NAMES
from ..attribute_loads import loads_plainly, plain_loads
from ..native_guards import MISSING, Binding
from .call_graph import belongs_to_torch
from .code_objects import cell_value, has_type
from .dead_code import live_code
from .settings import PLAIN_TYPES, Settings, as_setting, bare_module, has_settings, is_constant, is_plain
from .snapshots import CodeSnapshot, NotTriable, has_finalizer

_BUILTINS = """any float int len list max min range str sum super tuple NotImplementedError RuntimeError TypeError
    ValueError AssertionError""".split()
WRITING_OPCODES = tuple(
    "STORE_ATTR DELETE_ATTR STORE_GLOBAL DELETE_GLOBAL STORE_SUBSCR DELETE_SUBSCR IMPORT_NAME".split()
)
_SHAPES = {"shape", "size", "len"}
_PIECEWISE = ("int", "max", "min")
_CASTS = {"bfloat16", "contiguous", "float", "float16", "float32", "to", "type_as"}
_CHOOSING_OPCODES = ("IS_OP", "CONTAINS_OP", "BINARY_SUBSCR", "COMPARE_OP")
# The attributes of tensors and of torch that code may name: arithmetic, and the parts of norms, beside the activations.
_ALLOWED = FUNCTION_NAMES.union(
    """Tensor add bfloat16 bias contiguous div dtype erf float float16 float32 forward functional layer_norm math mean
    movedim mul neg nn normalize normalized_shape permute pi pow rms_norm rsqrt shape size sqrt square sub sum to
    torch transpose type type_as unsqueeze var view weight""".split()
)
_METHOD_TYPES = types.FunctionType | staticmethod | classmethod | functools.partial
# The methods of a user's `autograd.Function`, both of which are read.
_METHODS = ("forward", "backward")
# The attributes of such a class: `_backward_cls` is torch's, all others but the methods are Python's.
_ATTRIBUTES = frozenset(
    (*_METHODS, "_backward_cls", "__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__")
)
# The names that its methods and callers may use: the forward passes nothing to the backward but saved tensors.
_NAMES = frozenset(("apply", "save_for_backward", "saved_tensors"))


def read_forward(
    module: nn.Module, gradients: bool = False, every_dtype: bool = False
) -> tuple[Settings, CodeSnapshot]:
    """The settings that a module's forward reads, by name, and a snapshot of the code that the forward reaches.

    `gradients`: whether the trial covers gradients too, so that the code may use an `autograd.Function`. `every_dtype`:
    whether the trial covers each dtype, so that the code may decide by the dtype. Raises `NotTriable`.
    """
    reader = CodeReader(module, gradients)
    reader.read_function(type(module).forward, own=True)
    if depends_on_shapes(reader):
        raise NotTriable("decides by the shape of its input")
    if depends_on_dtype(reader) and not every_dtype:
        raise NotTriable("decides by the dtype of its input")
    reader.read_modules()
    if reader.settings:
        reader.dependencies += plain_loads(type(module))
    settings = tuple(sorted(reader.settings.items()))
    again = functools.partial(_forward_again, type(module), settings, tuple(module._parameters))
    return settings, CodeSnapshot(reader.dependencies, reader.helpers, again)


def _forward_again(kind: type[nn.Module], settings: Settings, parameters: tuple[str, ...]) -> CodeSnapshot:
    """The snapshot for a module of that class, with these settings and names of parameters. Raises `NotTriable`."""
    if has_finalizer(kind):
        raise NotTriable("has a finalizer")
    module = bare_module(kind, settings)
    module.__dict__["_parameters"] = dict.fromkeys(parameters)
    return read_forward(module, gradients=True, every_dtype=True)[1]


def depends_on_shapes(reader: "CodeReader") -> bool:
    """Whether the result of the code may depend on the shapes of its inputs."""
    return bool(reader.names & _SHAPES) and (reader.has_branches or reader.is_piecewise)


def depends_on_dtype(reader: "CodeReader") -> bool:
    """Whether the function that the code computes may depend on the dtype of its input."""
    reads_dtype = "dtype" in reader.names and (reader.has_branches or reader.has_choices)
    # A cast returns the tensor itself if the dtype is the same.
    return reads_dtype or (reader.has_identity_checks and bool(reader.names & _CASTS))


def is_unchanged(module: nn.Module, settings: Settings, code: CodeSnapshot | None) -> bool:
    """Whether the module still has these settings and the code still is the same."""
    if not has_settings(module, settings):
        return False
    if code is None:
        return True
    attributes = module.__dict__
    for name in code.helpers:
        if name in attributes:
            return False
    return code.is_same()


class CodeReader:
    """Collects the dependencies of all code that a module's forward reaches.

    Raises `NotTriable` at the first instruction that forbids a trial.
    """

    forbidden_opcodes: tuple[str, ...] = WRITING_OPCODES

    def __init__(self, module: nn.Module, gradients: bool = False) -> None:
        self.module = module
        self._gradients = gradients
        self._allowed_names = _ALLOWED
        self.settings: dict[str, Any] = {}
        self.names: set[str] = set()
        self.has_branches = False
        # Whether the code computes a piecewise constant function, perhaps of the sizes in a shape.
        self.is_piecewise = False
        # Whether the code compares values, or takes an item by a key.
        self.has_choices = False
        self.has_identity_checks = False
        self.dependencies: list[Binding] = []
        # Names that the code finds in the class.
        self.helpers: set[str] = set()
        self._seen: set[types.CodeType] = set()

    def read_function(self, function: Any, own: bool = False) -> None:
        """Read a Python function. Functions of torch are trusted, unless the function is the module's `own` method."""
        if isinstance(function, functools.partial):
            if not all(map(is_constant, (*function.args, *function.keywords.values()))):
                raise NotTriable("binds arguments that may change")
            self.dependencies += [(function.keywords, name, value) for name, value in function.keywords.items()]
            function = function.func
        elif isinstance(function, staticmethod | classmethod):
            function = function.__func__
        if is_torch_callable(function) and not own:
            return
        if not has_type(function, types.FunctionType):
            kind = type(function).__name__
            if not callable(function):
                raise NotTriable(f"reads an object of type {kind}, which may change")
            name = getattr(function, "__name__", f"an object of type {kind}")
            raise NotTriable(f"calls {name}, which is no function of Python's or torch's")
        for cell in function.__closure__ or ():
            value = cell_value(cell, MISSING)
            if value is MISSING:
                raise NotTriable("reads a variable that has no value yet")
            if value is self.module or any(value is kind for kind in type(self.module).__mro__):
                continue
            self.dependencies.append((cell, "cell_contents", value))
            if has_type(value, type):
                self.read_value(value)
            elif callable(value):
                self.read_function(value)
            else:
                raise NotTriable("reads a variable of the function around it")
        if not all(map(is_constant, function.__defaults__ or ())) or function.__kwdefaults__:
            raise NotTriable("has defaults that may change")
        self.dependencies += [(function, name, getattr(function, name)) for name in ("__code__", "__defaults__")]
        code, assumptions = live_code(function)
        self.dependencies += assumptions
        self._read_code(code, function.__globals__)

    def read_modules(self) -> None:
        """Add the attributes of torch's modules, and of modules in them, that the code names."""
        waiting = [value for _, _, value in self.dependencies if has_type(value, types.ModuleType)]
        reached = set()
        while waiting:
            members = vars(waiting.pop())
            if id(members) not in reached:
                reached.add(id(members))
                for name in sorted(self.names & members.keys()):
                    self.dependencies.append((members, name, members[name]))
                    if isinstance(members[name], types.ModuleType):
                        waiting.append(members[name])

    def snapshot(self, also: Iterable[Binding] = ()) -> CodeSnapshot:
        """All that was read, and these bindings."""
        return CodeSnapshot([*also, *self.dependencies], self.helpers)

    def _read_code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        if code in self._seen:
            return
        self._seen.add(code)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._read_code(constant, names)
            self.check_constant(constant)
        instructions = list(dis.get_instructions(code))
        for index, step in enumerate(instructions):
            if step.opname in self.forbidden_opcodes:
                raise NotTriable("writes as it goes")
            if step.opname in ("BUILD_SLICE", "BINARY_SLICE"):
                count = step.arg or 0 if step.opname == "BUILD_SLICE" else 2
                self.check_bounds(instructions[max(0, index - count) : index])
            is_conditional_jump = "JUMP_" in step.opname and "_IF_" in step.opname
            self.has_branches |= is_conditional_jump or step.opname == "FOR_ITER"
            self.is_piecewise |= step.opname.startswith("BINARY_") and step.argrepr.rstrip("=") in ("//", "%")
            self.is_piecewise |= step.opname == "COMPARE_OP" or step.argval in _PIECEWISE
            self.has_identity_checks |= step.opname == "IS_OP"
            self.has_choices |= step.opname in _CHOOSING_OPCODES or step.argrepr == "[]"
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.read_global(step.argval, names)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                self.read_attribute(step.argval)

    def check_constant(self, value: Any) -> None:
        """Check a constant of the code."""
        if isinstance(value, slice) and value != slice(None):
            raise NotTriable("computes with a slice of its input")

    def check_bounds(self, loads: Sequence[dis.Instruction]) -> None:
        """Check the instructions that load the bounds, and perhaps the step, of a slice.

        A bound that is larger than the tensors of a trial would not show there.
        """
        if any(load.opname != "LOAD_CONST" or load.argval is not None for load in loads):
            raise NotTriable("computes with a slice of its input")

    def read_global(self, name: str, names: dict[str, Any]) -> None:
        """Read a name among the globals `names`, or a builtin."""
        self.names.add(name)
        if name in names:
            self.dependencies.append((names, name, names[name]))
            self.read_value(names[name])
        elif name not in _BUILTINS or not hasattr(builtins, name):
            raise NotTriable(f"names {name}, which is not on the list of what is known")
        else:
            self.dependencies.append((names, name, MISSING))

    def read_value(self, value: Any) -> None:
        """Read the value of a global."""
        if has_type(value, types.ModuleType):
            if value.__name__ != "math" and value.__name__.partition(".")[0] != "torch":
                raise NotTriable(f"uses {value.__name__}")
        elif self._gradients and has_type(value, type) and _is_plain_autograd_function(value):
            self._allowed_names |= _NAMES
            for method in _METHODS:
                self.dependencies.append((value, method, getattr(value, method)))
                self.read_function(getattr(value, method), own=True)
        elif has_type(value, type):
            if not is_torch_callable(value) and not issubclass(value, Exception):
                raise NotTriable(f"uses the class {value.__name__}")
        elif type(value) not in PLAIN_TYPES:
            self.read_function(value)

    def read_attribute(self, name: str) -> None:
        """Read an attribute, which may be the module's whatever the object is."""
        self.names.add(name)
        module = self.module
        if name == "training" or name in module._buffers:
            raise NotTriable("depends on its mode or on buffers")
        if name in module.__dict__:
            value = module.__dict__[name]
            if not loads_plainly(type(module), name):
                raise NotTriable(f"loads {name} by code of its class")
            if has_type(value, types.FunctionType | types.BuiltinFunctionType | functools.partial):
                self.read_function(value)
            elif not is_plain(value):
                raise NotTriable(f"reads {name}, which is no plain setting")
            self.settings[name] = as_setting(value)
        elif name not in module._parameters:
            # All definitions along the MRO count: super() may call an overridden one.
            owners = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
            definers = [owner for owner in owners if name in vars(owner)]
            for owner in definers:
                member = vars(owner)[name]
                if has_type(member, property | functools.cached_property):
                    raise NotTriable(f"computes {name} by a property")
                if not has_type(member, _METHOD_TYPES):
                    raise NotTriable(f"reads {name} of its class")
                self.read_function(member, own=True)
            if definers:
                self.helpers.add(name)
                # Any class of the MRO may define the name later, or get other bases.
                self.dependencies += [(owner, name, getattr(owner, name, MISSING)) for owner in owners]
            if not definers and name not in self._allowed_names:
                raise NotTriable(f"names {name}, which is not on the list of what is known")


def is_torch_callable(function: Any) -> bool:
    """Whether a function or class is torch's own, or of `math`."""
    named = getattr(function, "__module__", None) or getattr(getattr(function, "__self__", None), "__name__", "")
    is_original = not has_type(function, types.FunctionType) or belongs_to_torch(function)
    return callable(function) and is_original and str(named).partition(".")[0] in ("torch", "math")


def _is_plain_autograd_function(kind: type) -> bool:
    """Whether a class is a direct subclass of `autograd.Function` with only a static forward and backward."""
    own = vars(kind)
    is_plain = kind.__bases__ == (Function,) and own.keys() <= _ATTRIBUTES
    return is_plain and all(isinstance(own.get(name), staticmethod) for name in _METHODS)
