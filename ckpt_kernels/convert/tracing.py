"""The graph of one method of one module, for arguments of one kind.

The method runs once on proxies (torch.fx's), with stand-ins in the places of the module's children, which record that
they are called. What it decides by the arguments it is given, by its own settings, by training or evaluation, by dtype
or device, is so decided in the graph; `signature` tells all of that, and a graph serves the calls that have the
signature it was traced for. Whatever else a method may do (decide by values, draw random numbers, set attributes) ends
in `Untraceable`.
"""

import operator
import random
import sys
import textwrap
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .swap import rule_of

# Values that a method may decide by. All others are proxies in its graph.
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)

# Random numbers are looked after for the whole process.
_lock = threading.Lock()


class Untraceable(Exception):
    """A method whose graph cannot be had, and why."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def signature(module: nn.Module, inlined: Sequence[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """All that a graph may depend on but the values of tensors."""
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    place: tuple = ()
    if first is not None:
        place = first.dtype, first.device.type, torch.is_autocast_enabled(first.device.type)
    settings = [v for m in (module, *inlined) for v in vars(m).values() if type(v) in _CONSTANTS]
    hooked = [has_hooks(m) for m in inlined]
    weights = [None if p is None else p.dtype for m in (module, *inlined) for p in m._parameters.values()]
    return (
        *map(_kind, args),
        None,
        *[(name, _kind(value)) for name, value in kwargs.items()],
        *place,
        *settings,
        *hooked,
        *weights,
        torch.is_grad_enabled(),
    )


def _why(error: Exception) -> str:
    if isinstance(error, fx.proxy.TraceError) or "symbolic tracing" in str(error):
        return "decides or counts by values that are computed"
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {textwrap.shorten(text, 90, placeholder=' ...')}"


def is_simple(graph: fx.Graph) -> bool:
    """Whether it is small, of one tensor, and makes one of it."""
    first, *others = graph.nodes
    made = others[-1].args[0]
    return len(others) <= 8 and all(n.op != "placeholder" for n in others) and isinstance(made, fx.Node)


def is_constant(value: Any) -> bool:
    return type(value) in _CONSTANTS


def _kind(value: Any) -> Hashable:
    # 1, 1.0 and True are equal, and are not the same to a method.
    return (type(value), value) if type(value) in _CONSTANTS else type(value)


class Trace(NamedTuple):
    """A graph, and the settings of children that it depends on: names of modules and attributes, and their values."""

    graph: fx.Graph
    settings: list[tuple[str, str, Any]]


def trace(
    method: Callable[..., Any], module: nn.Module, inlined: Sequence[str], args: tuple, kwargs: dict[str, Any]
) -> Trace:
    """The graph of `method(module, *args, **kwargs)`; its placeholders are the arguments that are not constants.

    `inlined` names the modules below it whose own forward is to be part of the graph.
    """
    with _lock:
        return _trace(method, module, inlined, args, kwargs)


def _trace(
    method: Callable[..., Any], module: nn.Module, inlined: Sequence[str], args: tuple, kwargs: dict[str, Any]
) -> Trace:
    tracer = _Tracer(module, args, kwargs)
    stand_in = tracer.stand_in(module, "", inlined)
    before = {id(m): dict(vars(m)) for m in tracer.shadows}
    numbers = _RandomNumbers()
    try:
        result = method(stand_in, *tracer.args, **tracer.kwargs)
        tracer.graph.output(tracer.create_arg(result))
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(_why(error)) from error
    finally:
        drew = numbers.restore()
    if drew:
        raise Untraceable("draws random numbers that decide what it computes")
    for shadow in tracer.shadows:
        now, then = vars(shadow), before[id(shadow)]
        if now.keys() != then.keys() or any(now[key] is not then[key] for key in now):
            raise Untraceable("sets attributes as it goes")
    return Trace(tracer.graph, tracer.settings)


class _RandomNumbers:
    """The state of all generators that a forward may draw from by itself."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> bool:
        """Whether they had moved."""
        now = _RandomNumbers()
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        moved = not torch.equal(self._torch, now._torch) or self._python != now._python
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
            moved |= self._numpy[2] != now._numpy[2] or any(self._numpy[1] != now._numpy[1])
        return moved


class _Tracer(fx.Tracer):
    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.root = module
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.shadows: list[nn.Module] = []
        self.settings: list[tuple[str, str, Any]] = []
        self._tensors = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        self._dtype = None if first is None else first.dtype
        self._device = None if first is None else first.device
        if first is None or torch.is_autocast_enabled(first.device.type):
            self._dtype = None
        self.args = [self._argument(a, f"arg{i}") for i, a in enumerate(args)]
        self.kwargs = {name: self._argument(a, name) for name, a in kwargs.items()}

    def _argument(self, value: Any, name: str) -> Any:
        if is_constant(value):
            return value
        proxy = self.create_proxy("placeholder", name, (), {})
        proxy.__dict__["_stands_for"] = Tensor if isinstance(value, Tensor) else type(value)
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) not in self._tensors:
                raise Untraceable("makes a tensor of its own")
            return self.create_node("get_attr", self._tensors[id(a)], (), {})
        if isinstance(a, nn.Module):
            raise Untraceable(f"passes a module on, {type(a).__name__}")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What is asked of dtypes and devices is answered as the first tensor argument has them."""
        return bool(self._resolved(obj.node))

    def _resolved(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node.op == "call_function" and node.target is getattr:
            of, name = node.args
            if name == "dtype" and self._dtype is not None:
                return self._dtype
            if name == "device" and self._device is not None:
                return self._device
            if name in ("type", "is_floating_point"):
                return getattr(self._resolved(of), name)
        if node.op == "call_function" and node.target in (operator.eq, operator.ne):
            left, right = map(self._resolved, node.args)
            return node.target(left, right)
        raise Untraceable("decides by values that are computed")

    def stand_in(self, module: nn.Module, name: str, inlined: Sequence[str]) -> nn.Module:
        """A module with the original's class and attributes, which records a call, or if `inlined` runs on proxies."""
        real = getattr(type(module), "original", type(module))
        runs = name == "" or name in inlined
        recorded = {} if runs else {"__call__": self._recording(name), "__getattribute__": self._reading(name)}
        shadow = object.__new__(type(real.__name__, (real,), recorded | {"__module__": real.__module__}))
        shadow.__dict__.update({key: value for key, value in vars(module).items() if not key.endswith("_hooks")})
        shadow.__dict__.update({key: value for key, value in nn.Module().__dict__.items() if key.endswith("_hooks")})
        if rule_of(module) is not None:
            del shadow.__dict__["_ckpt_rule"]
        prefix = f"{name}." if name else ""
        shadow.__dict__["_modules"] = {
            key: child if child is None else self.stand_in(child, prefix + key, inlined)
            for key, child in module._modules.items()
        }
        if runs:
            self.shadows.append(shadow)
        return shadow

    def _recording(self, name: str) -> Callable[..., fx.Proxy]:
        def record(_: nn.Module, *args: Any, **kwargs: Any) -> fx.Proxy:
            return self.create_proxy("call_module", name, args, kwargs)

        return record

    def _reading(self, name: str) -> Callable[[nn.Module, str], Any]:
        """Notes the settings that are read of a module that is not run."""

        def read(shadow: nn.Module, attribute: str) -> Any:
            value = object.__getattribute__(shadow, attribute)
            if is_constant(value) and not attribute.startswith("__"):
                self.settings.append((name, attribute, value))
            return value

        return read


class _Proxy(fx.Proxy):
    """A proxy that does not let itself be taken for what it is: an argument is of its value's class, and whoever asks
    of what class a result is gets no answer."""

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("_stands_for") is Tensor and not hasattr(Tensor, name):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise Untraceable("sets attributes as it goes")
        super().__setattr__(name, value)

    @property
    def __class__(self) -> type:
        stands_for = self.__dict__.get("_stands_for")
        if stands_for is not None:
            return stands_for
        asks = sys._getframe(1).f_globals.get("__name__", "")
        if asks.startswith("torch.") or asks == __name__:
            return _Proxy
        raise Untraceable("decides by the class of what is computed")


def _recorded_in_place(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    def record(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# torch.fx would take `x += y` for `x = x + y`, which is not the same to whoever else holds x.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(_Proxy, f"__i{_name}__", _recorded_in_place(getattr(operator, f"i{_name}")))
