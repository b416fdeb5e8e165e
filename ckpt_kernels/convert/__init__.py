"""Real models, one line: `convert(model)` makes a model's own modules compute with this package's kernels.

    report = ckpt_kernels.convert(model)
    print(report)

What is replaced is found by what modules compute, not by their names: see `norms`, `pointwise` and `traced` for how.
The modules stay the objects they were (see `swap`), and `revert` gives them their own forward back.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..functional.linear import level_name
from . import expected
from .calls import is_linear
from .fusion import fuse
from .norms import Norm, norm_of
from .pointwise import named_activation, pointwise_of
from .report import LeftAlone, Replaced, Report
from .selection import Selection
from .swap import Rule, Within, discarding, is_converted, is_wrapped, rule_of, selecting, swap, swap_back
from .traced import Traced
from .tracing import Untraceable, has_hooks, is_constant, is_simple, trace

__all__ = ["LeftAlone", "Replaced", "Report", "convert", "revert"]

# Methods, beside forward, in which a class of torch's does what fuses.
_INNER_METHODS = {nn.TransformerEncoderLayer: "_ff_block", nn.TransformerDecoderLayer: "_ff_block"}


def convert(
    model: nn.Module,
    *,
    recompute: str = "output",
    include: Iterable[str | type[nn.Module]] | None = None,
    exclude: Iterable[str | type[nn.Module]] | None = None,
) -> Report:
    """Makes the model's modules compute with this package's kernels, in place, and says what it did.

    Every module, parameter, buffer, hook, name and mode stays as it is; so do the results, up to rounding, but for the
    random numbers of dropout, which are drawn otherwise. A model that is converted already is converted anew.

    Args:
        model: anything; what is not recognised is left alone.
        recompute: what is kept for backward. "block": the inputs of blocks, and what reads their outputs keeps these.
            "output": not the outputs either, which are made again (see `recompute.discard_outputs`). "all": not the
            products that MLPs begin with either, which run again.
        include: names of modules (with * and ?) or classes; only these and what is below them. None is all.
        exclude: names or classes of modules to be left alone with all that is below them.

    Raises TypeError for what is no module, ValueError for an unknown level or a name that fits no module, and
    RuntimeError for modules that were converted and then wrapped by others.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    level_name(recompute)
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("model is compiled already; expected one that is not: convert first, then torch.compile")
    selection = Selection(model, include, exclude)
    revert(model)
    try:
        return _Conversion(model, recompute, selection).run()
    except BaseException:
        revert(model)
        raise


def revert(model: nn.Module) -> None:
    """Gives all converted modules of the model their own forward back. Does nothing to those that are not converted.

    Raises RuntimeError, and changes nothing, where a converted module has been wrapped by a parametrization or by FSDP
    since, which have to be taken off first.
    """
    for name, module in model.named_modules():
        if is_wrapped(module):
            raise RuntimeError(
                f"{name or 'the model'} was converted and has become {type(module).__name__} since; "
                "expected that to be undone before it is reverted or converted again"
            )
    for module in model.modules():
        if is_converted(module):
            swap_back(module)


class _Conversion:
    def __init__(self, model: nn.Module, recompute: str, selection: Selection) -> None:
        self.model = model
        self.recompute = recompute
        self.selection = selection
        self.replaced: list[Replaced] = []
        self.left_alone: list[LeftAlone] = []
        self.rules: dict[nn.Module, Rule] = {}
        self.simple: set[nn.Module] = set()

    def run(self) -> Report:
        named = {module: name for name, module in self.model.named_modules()}
        for module, name in named.items():
            self._convert_leaf(name, module)
        # From the leaves up: what a module fuses by itself is no part of another's graph.
        for module, name in reversed(named.items()):
            if module not in self.rules and next(module.children(), None) is not None:
                self._convert_composite(name, module)
        if self.rules and self.recompute != "block":
            for module in self._roots():
                rule = rule_of(module)
                if rule is not None:
                    swap_back(module)
                may_select = module is not self.model and not any(map(_writes, module.modules()))
                swap(module, rule or Within(), (discarding, selecting) if may_select else (discarding,))
        order = {name: i for i, name in enumerate(named.values())}
        self.replaced.sort(key=lambda entry: order[entry.name])
        self.left_alone.sort(key=lambda entry: order[entry.name])
        return Report(self.recompute, self.replaced, self.left_alone)

    def _apply(self, name: str, module: nn.Module, rule: Rule, kept: expected.Kept) -> None:
        self.replaced.append(Replaced(name, type(module).__name__, str(rule), *kept))
        self.rules[module] = rule
        swap(module, rule)

    def _leave(self, name: str, module: nn.Module, reason: str) -> None:
        self.left_alone.append(LeftAlone(name, type(module).__name__, reason))

    def _convert_leaf(self, name: str, module: nn.Module) -> None:
        norm, reason = norm_of(module)
        rule = norm or pointwise_of(module)
        if rule is None:
            if reason:
                self._leave(name, module, reason)
        elif not self.selection.covers(module):
            self._leave(name, module, "not selected")
        elif "forward" in module.__dict__:
            self._leave(name, module, "its forward was replaced on the instance")
        else:
            self._apply(name, module, rule, expected.of_norm(module, rule, self.recompute))

    def _convert_composite(self, name: str, module: nn.Module) -> None:
        if not self.selection.covers(module) or "forward" in module.__dict__:
            return
        inner = next((m for kind, m in _INNER_METHODS.items() if isinstance(module, kind)), "forward")
        method = getattr(type(module), inner)
        inlined = list(self._inlined(module))
        left_alone = self.selection.left_alone_below(module)
        reasons = []
        for args, kwargs in _guesses(method, _dtype(module)):
            try:
                graph = trace(method, module, inlined, args, kwargs).graph
            except Untraceable as error:
                reasons.append(str(error))
                continue
            simple = inner == "forward" and not kwargs and is_simple(graph)
            found = fuse(graph, module, left_alone, self.recompute)
            if found.names:
                rule = Traced(inner, inlined, left_alone, self.recompute, found.names)
                self._apply(name, module, rule, found.kept)
                return
            if simple:
                self.simple.add(module)
                return
        if reasons and self._could_fuse(module):
            self._leave(name, module, f"no graph of its forward: {reasons[0]}")

    def _inlined(self, module: nn.Module, prefix: str = "") -> Iterator[str]:
        """Names of the modules below that fuse nothing themselves and may be part of what does."""
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) or (child in self.simple and not has_hooks(child)):
                if child in self.simple:
                    yield prefix + name
                yield from self._inlined(child, f"{prefix}{name}.")

    def _could_fuse(self, module: nn.Module) -> bool:
        """Whether the module itself holds an activation and what one fuses with."""
        children = list(module.children())
        partners = [child for child in children if is_linear(child) or isinstance(self.rules.get(child), Norm)]
        return bool(partners) and any(named_activation(child) for child in children)

    def _roots(self) -> Iterator[nn.Module]:
        """The modules whose forward lets go of outputs: the model, and the members of its lists of layers, which may
        be checkpointed or called one by one."""
        found: dict[nn.Module, None] = {self.model: None}
        for parent in self.model.modules():
            if isinstance(parent, nn.ModuleList):
                for layer in parent:
                    if any(module in self.rules for module in layer.modules()):
                        found[layer] = None
        for module in found:
            if "forward" not in module.__dict__ and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                yield module


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _writes(module: nn.Module) -> bool:
    """Whether it writes to what it was given, or to its own buffers, which must not happen twice."""
    return bool(getattr(module, "inplace", False) or getattr(module, "track_running_stats", False))


def _guesses(method: Any, dtype: torch.dtype) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Arguments that a method may be called with: tensors for those it must have, and then for all it names."""
    tensor = torch.empty(0, dtype=dtype)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    required = [p for p in named if p.default is p.empty]
    yield (tensor,) * len(required), {}
    if len(named) + len(keywords) > len(required):
        arguments = [_guess(p, tensor) for p in named]
        yield tuple(arguments), {p.name: _guess(p, tensor) for p in keywords}


def _guess(parameter: inspect.Parameter, tensor: torch.Tensor) -> Any:
    """A tensor, but for what is by default a constant of another kind than None, and None for a dict of settings."""
    default = parameter.default
    if "dict" in str(parameter.annotation).lower():
        return None
    return default if default is not None and is_constant(default) else tensor
