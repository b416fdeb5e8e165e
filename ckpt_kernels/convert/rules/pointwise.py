"""Which activations, dropouts and gates a module computes.

torch.nn's are known by their class. Any other module without parameters and modules of its own is tried out in
float64, values and derivative, where two formulas for one activation agree.
"""

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional as F
from ...activations import FUNCTIONS, NAMES, name_of
from ...backends.reference import ACTIVATIONS
from ..asked import Activation, Found, Such
from ..code.called import is_as_torch_wrote_it
from ..code.own_gradients import has_own_gradient
from ..code.reached import Code, NotTried, Settings, is_as_tried
from ..code.remembering import remembered
from ..loads import LOADS_PLAINLY, has_children, is_left_to_modules, is_set, loads_plainly, tensors_of
from ..operands import CALLS_FORWARD, HOOKS, is_called_plainly
from ..swap import is_patched, original_of, rule_of
from .likeness import looks_like_activation
from .rule import Rule, Unary
from .trial import POINTWISE, Outline, forward_of, in_a_thread_of_its_own, outline_of, result_of, takes_one

# What the forwards of torch's activations, dropouts and gates read.
_SETTINGS = (
    *("alpha", "approximate", "beta", "dim", "inplace", "max_val", "min_val", "negative_slope", "p", "threshold"),
    "training",
)
# Their own gradient needs no more than the output, which what reads it keeps too: nothing to win.
KEPT_BY_OUTPUT = ("identity", "relu", "leaky_relu", "sigmoid", "tanh")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_TORCHS = {
    kind: (kind.forward, kind.forward.__code__)
    for kind in vars(nn).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and is_as_torch_wrote_it(kind.forward)
}


class Tried(NamedTuple):
    """The activation that something computes, or None, whether torch keeps its input for that, and whether it is exact:
    one with rounded constants is another one to float64."""

    name: str | None = None
    keeps_input: bool = True
    is_exact: bool = True


@dataclass(frozen=True)
class ActivationRule(Unary):
    """An activation by its name, as long as the module's settings are what they were."""

    name: str
    settings: Settings
    code: Code | None
    keeps_input: bool = True
    is_exact: bool = True

    def holds(self, module: nn.Module, wide: bool = False) -> bool:
        """Whether the module is what it was tried as, also where operands are `wide`, which is float64."""
        return (self.is_exact or not wide) and is_as_tried(module, self.settings, self.code)

    def of(self, module: nn.Module, input: Tensor) -> Tensor | None:
        # Eager torch does not keep the input of some formulas, to which somebody may write.
        if not self.holds(module, input.dtype == torch.float64) or (torch.is_grad_enabled() and not self.keeps_input):
            return None
        return F.bias_act(input, activation=self.name)

    def as_activation(self, asked: tuple[Found, ...]) -> Activation:
        found = asked if self.code is None else (*asked, *self.code.found)
        # A class below it may have another forward.
        (_, name, forward), *_ = asked
        such = Such(nn.Module, ((name, forward), *CALLS_FORWARD), found, (), HOOKS, ("forward",))
        return Activation(such, self.settings, self.name)

    def __str__(self) -> str:
        return f"bias_act ({self.name}){'' if self.keeps_input else ' where it is fused, and without gradients'}"


@dataclass(frozen=True)
class DropoutRule(Unary):
    """`torch.nn.Dropout`, of which no mask is kept. Its random numbers are not those that torch's would draw."""

    def of(self, module: Any, input: Tensor) -> Tensor | None:
        p = _probability(module)
        if module.inplace is not False or module.training is not True or not p:
            return None
        return F.bias_act(input, dropout_p=p)

    def __str__(self) -> str:
        return "bias_act (dropout)"


@dataclass(frozen=True)
class GLURule(Unary):
    """`torch.nn.GLU` over the last dimension."""

    def of(self, module: nn.Module, input: Tensor) -> Tensor | None:
        last = type(module.dim) is int and module.dim in (-1, input.dim() - 1)
        if not last or input.dim() == 0 or input.shape[-1] % 2:
            return None
        return F.packed_glu(input, activation="sigmoid", layout="value_first")

    def __str__(self) -> str:
        return "packed_glu (sigmoid)"


def _probability(module: Any) -> float | None:
    return float(module.p) if type(module.p) in (float, int) and 0 <= module.p <= 1 else None


def pointwise_of(module: nn.Module) -> tuple[Rule | None, str]:
    """How an activation, a dropout or a gate is to be converted, or why what looks like one is not."""
    if _is_torchs(module, nn.Dropout):
        return (DropoutRule() if _probability(module) and module.inplace is False else None), ""
    if _is_torchs(module, nn.GLU):
        last = type(module.dim) is int and module.dim == -1
        return (GLURule(), "") if last else (None, "halves another dimension than the last")
    if is_set(module, "inplace"):
        # It counts only where its input has just been made: see `activation_of`.
        none = name_of(module) is None and looks_like_activation(module)
        return None, _why_none(module) if none else ""
    try:
        (name, keeps_input, is_exact), settings, code = _named(module)
    except NotTried as error:
        return None, str(error) if looks_like_activation(module) else ""
    if name is None:
        return None, _why_none(module) if looks_like_activation(module) else ""
    return (None if name in KEPT_BY_OUTPUT else ActivationRule(name, settings, code, keeps_input, is_exact)), ""


def _why_none(module: nn.Module) -> str:
    if any(True for _ in tensors_of(module)):
        return "has parameters, which none of our activations has"
    return "computes none of our activations"


def activation_of(act: Any, made: bool = False, wide: bool = False) -> str | None:
    """The name of the activation that a call of a module or function is now; None if it is none of ours, or more, or
    not to float64 where operands are that `wide`.

    One that writes over its input counts only where that has just been `made` for it, and nobody else sees it.
    """
    if isinstance(act, _FUNCTIONS):
        return FUNCTIONS.get(act)
    if not isinstance(act, nn.Module) or not is_called_plainly(act) or (not made and is_set(act, "inplace")):
        return None
    rule = rule_of(act)
    if type(rule) is ActivationRule:
        return rule.name if rule.holds(act, wide) and not is_patched(type(act)) else None
    if rule is not None or not _is_torchs(act):
        return None
    return name_of(act)


def _of_torchs(kind: type[nn.Module], name: str) -> Activation:
    forward, code = _TORCHS.get(kind, (None, None))
    own = (("forward", forward), *CALLS_FORWARD, *LOADS_PLAINLY)
    such = Such(kind, own, ((kind.forward, "__code__", code),), _SETTINGS, HOOKS, ("forward",))
    return Activation(such, (), name)


# What C knows of functions, and of torch's classes that are left as they are.
KNOWN: tuple[tuple[Any, str | Activation], ...] = (
    *FUNCTIONS.items(),
    *((kind, _of_torchs(kind, name)) for kind, name in ((nn.ReLU, "relu"), (nn.Sigmoid, "sigmoid"), (nn.Tanh, "tanh"))),
)


def _is_torchs(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    found = original_of(module)
    if found not in _TORCHS or (kind is not None and found is not kind):
        return False
    forward, code = _TORCHS[found]
    own = found.forward is forward and forward.__code__ is code
    return own and (is_left_to_modules(found, *_SETTINGS) or loads_plainly(found, *_SETTINGS))


def is_as_torch_has_it(module: nn.Module, *names: str) -> bool:
    """Whether it computes what torch's class does, of settings under these names that no code of the class computes."""
    return _is_torchs(module) and loads_plainly(original_of(module), *names)


def _named(module: nn.Module) -> tuple[Tried, Settings, Code | None]:
    if _is_torchs(module):
        name = name_of(module)
        if name is None:
            return Tried(), (), None
        plain = {k: v for k, v in vars(module).items() if type(v) in (bool, int, float, str) and k != "training"}
        return Tried(name), tuple(sorted(plain.items())), None
    if any(True for _ in tensors_of(module)) or has_children(module):
        return Tried(), (), None
    if not takes_one(type(module).forward) or type(module).forward is nn.Module.forward:
        return Tried(), (), None
    outline = outline_of(module, gradients=True)
    return _tried_out(outline), outline.settings, outline.code


@remembered
@in_a_thread_of_its_own
def _tried_out(outline: Outline) -> Tried:
    made = outline.stand_in(torch.float64, torch.Generator("cpu").manual_seed(0))
    transposed = torch.ones(2, 3, dtype=torch.float64, device="cpu").t()
    if forward_of(made, transposed, POINTWISE).stride() != transposed.stride():
        return Tried()
    is_own = has_own_gradient(outline.code.found)
    return activation_by_trial(lambda points: forward_of(made, points, POINTWISE), is_own)


@in_a_thread_of_its_own
def activation_by_trial(compute: Callable[[Tensor], Tensor], is_own: bool = False) -> Tried:
    """The activation that a function of one tensor computes, values and derivative.

    The gradient may be its own, an `autograd.Function`'s whose code was read: it has to be the derivative times any
    gradient that comes in, and nothing else.
    """
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        points = _points()
        given = points.clone().requires_grad_()
        values = compute(given)
        if type(values) is not Tensor or values.shape != points.shape or values.dtype != points.dtype:
            return Tried()
        if not values.requires_grad or given._version or not torch.equal(given, points):
            return Tried()
        if not _is_linear(values, given) if is_own else _is_of_python(values):
            return Tried()
        keeps_input = given.data_ptr() in kept
        (slopes,) = torch.autograd.grad(values.sum(), given)
        for name in NAMES:
            again = points.clone().requires_grad_()
            expected = ACTIVATIONS[name](again)
            (expected_slopes,) = torch.autograd.grad(expected.sum(), again)
            # Formulas with rounded constants differ by less than float32 can tell.
            if _are_close(values, expected, 1e-7) and _are_close(slopes, expected_slopes, 1e-6, 1):
                # Exact ones differ by 25 roundings at most.
                is_exact = _are_close(values, expected, 1e-14) and _are_close(slopes, expected_slopes, 1e-14, 1)
                return Tried(name, keeps_input, is_exact)
    return Tried()


def _is_linear(values: Tensor, given: Tensor) -> bool:
    """Whether the gradient is one factor times what comes in, of either sign, small or large."""

    def gradient(incoming: Tensor) -> Tensor:
        return torch.autograd.grad(values, given, incoming, retain_graph=True)[0]

    slopes = result_of(gradient, torch.ones_like(values), POINTWISE)
    scales = torch.logspace(-6, 6, len(values), dtype=values.dtype, device=values.device)
    return all(
        torch.allclose(result_of(gradient, incoming, POINTWISE), incoming * slopes, rtol=1e-9, atol=0)
        for incoming in (scales, -scales, scales.flip(0))
    )


def _are_close(found: Tensor, expected: Tensor, bound: float, but: int = 0) -> bool:
    """But for that many points: one is where a relu bends, whose derivative there is a matter of taste."""
    return int((~torch.isclose(found, expected, rtol=bound, atol=bound)).sum()) <= but


def _points() -> Tensor:
    """Where activations are compared: densely where they bend, and over all that float32 holds, for what is cut off."""
    near = torch.linspace(-12, 12, 2403, dtype=torch.float64, device="cpu")
    far = torch.logspace(math.log10(12), 38, 1536, dtype=torch.float64, device="cpu")
    return torch.cat((-far.flip(0), near, far))


def _is_of_python(values: Tensor) -> bool:
    """Whether somebody's autograd.Function, whose gradient may be anything, is in the graph of the values."""
    waiting, seen = [values.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False
