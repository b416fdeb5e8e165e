"""Real models, one line: `convert(model)` makes a model's own modules compute with this package's kernels.

    report = ckpt_kernels.convert(model)
    print(report)

Norms, activations, dropouts and gates are found by what they compute (`norms`, `pointwise`, `trial`); what belongs
together, by how a module's methods are written (`methods`, `patterns`). A user's code runs on real tensors and on
nothing else, and nothing of one call is remembered for the next. The modules stay the objects they were (`swap`), and
`revert` gives them their own class back.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import backends
from ..functional.linear import RECOMPUTE
from ..memory import kept_bytes
from .around import Around, as_layer, discarding, discarding_products, selecting
from .called import uses_transforms
from .chain import chain_of
from .likeness import looks_like_activation, looks_like_several
from .loads import is_set, modules_of, named_modules, tensors_of
from .methods import looks_like_mlp, written_of
from .norm_trials import norm_of
from .norms import Norm, RowNorm
from .pointwise import pointwise_of
from .remembering import forget_what_is_local
from .report import LeftAlone, Replaced, Report
from .rule import Rule, Within
from .selection import Selection
from .swap import NotSwapped, is_converted, is_wrapped, may_be_swapped, rule_of, swap, swap_back
from .unknown_rotations import why_unknown
from .writes import writer_in

_ONE_BY_ONE = "its parts compute one by one: it writes them in no form that is known"
LEVELS = (*RECOMPUTE, "layer")

__all__ = ["LeftAlone", "Replaced", "Report", "convert", "is_converted", "revert"]


def convert(
    model: nn.Module,
    *,
    recompute: str = "output",
    include: Iterable[str | type[nn.Module]] | None = None,
    exclude: Iterable[str | type[nn.Module]] | None = None,
    inputs: Any = None,
) -> Report:
    """Makes the model's modules compute with this package's kernels, in place, and says what it did.

    Every module, parameter, buffer, hook, name and mode stays as it is; so do the results, up to rounding, but for the
    random numbers of dropout, which are drawn otherwise. A model that is converted already is converted anew.

    Args:
        model: anything; what is not recognised is left alone.
        recompute: what is kept for backward. "block": the inputs of blocks, and what reads their outputs keeps these.
            "output": not the outputs either, which are made again (see `recompute.discard_outputs`). "all": not the
            products that activations and gates read either, which run again. "layer": of each member of a ModuleList
            that has norms, what goes into it and what its attention saves of its result (see `recompute.layer`).
        include: names of modules (with * and ?) or classes; only these and what is below them. None is all.
        exclude: names or classes of modules to be left alone with all that is below them.
        inputs: what the model is called with, a tensor, a tuple, or a dict by name. If given, the report has the bytes
            that a forward pass keeps before and after, measured on copies of the model.

    Returns:
        A `Report` of what was replaced and what was left alone, which prints as a table.

    Raises:
        TypeError: `model` is no module, or is compiled already.
        ValueError: the level is unknown, or a name fits no module.
        RuntimeError: modules were converted and then wrapped by others.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> report = ckpt_kernels.convert(model, inputs=torch.randn(8, 64))
        >>> [(entry.name, entry.by) for entry in report.replaced]
        [('', 'norm, activation'), ('0', 'layer_norm'), ('1', 'bias_act (gelu)')]
        >>> before, after = report.kept
        >>> after < before
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if recompute not in LEVELS:
        raise ValueError(f"recompute is {recompute!r}; expected one of {', '.join(LEVELS)}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("model is compiled already; expected one that is not: convert first, then torch.compile")
    selection = Selection(model, include, exclude)
    before = None if inputs is None else kept_bytes(model, inputs, revert)
    revert(model)
    try:
        report = _Conversion(model, recompute, selection).run()
    except BaseException:
        revert(model)
        raise
    finally:
        forget_what_is_local()
    return report if before is None else replace(report, kept=(before, kept_bytes(model, inputs)))


def revert(model: nn.Module) -> None:
    """Gives all converted modules of the model their own forward back. Does nothing to those that are not converted.

    Args:
        model: a module.

    Raises:
        RuntimeError: a converted module has been wrapped by a parametrization or by FSDP since, which have to be taken
            off first. Nothing is changed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
        >>> _ = ckpt_kernels.convert(model)
        >>> ckpt_kernels.revert(model)
        >>> type(model[0]) is torch.nn.LayerNorm
        True
    """
    for name, module in named_modules(model):
        if is_wrapped(module):
            raise RuntimeError(
                f"{name or 'the model'} was converted and has become {type(module).__name__} since; "
                "expected that to be undone before it is reverted or converted again"
            )
    for module in modules_of(model):
        if is_converted(module):
            swap_back(module)


class _Conversion:
    def __init__(self, model: nn.Module, recompute: str, selection: Selection) -> None:
        self.model = model
        self.recompute = recompute
        # Within a module "layer" is "all".
        self.level = "all" if recompute == "layer" else recompute
        self.selection = selection
        self.replaced: list[Replaced] = []
        self.left_alone: list[LeftAlone] = []
        self.rules: dict[nn.Module, Rule] = {}
        self.writer = writer_in(model)

    def run(self) -> Report:
        named = {module: name for name, module in named_modules(self.model)}
        lets_go = self.recompute != "block" and not any(map(uses_transforms, named))
        for module, name in named.items():
            self._convert_leaf(name, module)
        for module, name in named.items():
            if module not in self.rules:
                self._convert_composite(name, module)
        if lets_go:
            for module in self._roots():
                self._surround(module)
        for module, name in named.items():
            self._explain(name, module)
        order = {name: i for i, name in enumerate(named.values())}
        self.replaced.sort(key=lambda entry: order[entry.name])
        self.left_alone.sort(key=lambda entry: order[entry.name])
        return Report(self.recompute, _backend_of(self.model), self.replaced, self.left_alone)

    def _apply(self, name: str, module: nn.Module, rule: Rule) -> None:
        kind = type(module).__name__
        try:
            swap(module, rule)
        except NotSwapped as error:
            self._leave(name, module, str(error))
            return
        # A part that was left alone as such may have been found in the way its methods are written.
        self.left_alone = [entry for entry in self.left_alone if entry.name != name]
        self.replaced.append(Replaced(name, kind, str(rule)))
        self.rules[module] = rule

    def _leave(self, name: str, module: nn.Module, reason: str) -> None:
        self.left_alone.append(LeftAlone(name, type(module).__name__, reason))

    def _convert_leaf(self, name: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            return
        rule: Rule | None
        rule, reason = norm_of(module)
        if isinstance(rule, RowNorm) and self.writer:
            rule = replace(rule, copied=True)
        if rule is None and not reason:
            rule, reason = pointwise_of(module)
        if rule is None:
            if reason:
                self._leave(name, module, reason)
        elif not self.selection.covers(module):
            self._leave(name, module, "not selected")
        elif parametrize.is_parametrized(module):
            self._leave(name, module, "its parameters are parametrized")
        elif "forward" in module.__dict__:
            self._leave(name, module, "its forward was replaced on the instance")
        elif not may_be_swapped(module):
            self._leave(name, module, "its forward is no plain method of its class, or asks for its class")
        else:
            self._apply(name, module, rule)
            if isinstance(rule, RowNorm) and not rule.takes_bfloat16:
                self._leave(name, module, "rounds bfloat16 where none of our row norms does: as it is for 16 bits")

    def _convert_composite(self, name: str, module: nn.Module) -> None:
        leaf = not module._modules and type(module).__module__.startswith("torch.nn.modules.")
        if leaf or not self.selection.covers(module) or not may_be_swapped(module):
            return
        rule: Rule | None = chain_of(module, self.level, self.selection.covers)
        reason = ""
        if rule is None:
            rule, reason = written_of(module, self.level, self.selection.covers)
        if rule is not None:
            self._apply(name, module, rule)
        elif looks_like_mlp(module, self.selection.covers):
            self._leave(name, module, reason or _ONE_BY_ONE)

    def _explain(self, name: str, module: nn.Module) -> None:
        """Says why what looks like something of ours is not replaced, where nothing in it is, and nothing was said."""
        if self.selection.covers(module) and (why := why_unknown(module)):
            self._leave(name, module, why)
        known = any(entry.name == name for entry in self.left_alone)
        if known or not self.selection.covers(module) or any(below in self.rules for below in modules_of(module)):
            return
        if several := looks_like_several(module):
            self._leave(name, module, f"looks like {several}, and {_ONE_BY_ONE}")
        elif not self.replaced and looks_like_activation(module):
            self._leave(name, module, "keeps no more than its output, which what reads it keeps too: nothing to win")

    def _roots(self) -> Iterator[nn.Module]:
        """The modules whose forward lets go of outputs: the model, and the members of its lists of layers, which may
        be checkpointed or called one by one."""
        found: dict[nn.Module, None] = {self.model: None}
        for parent in modules_of(self.model):
            if isinstance(parent, nn.ModuleList):
                found.update((layer, None) for layer in parent._modules.values() if layer is not None)
        for module in found:
            covered = self.selection.covers(module) or any(m in self.rules for m in modules_of(module))
            if covered and may_be_swapped(module) and _has_forward(module):
                yield module

    def _surround(self, module: nn.Module) -> None:
        rule = rule_of(module)
        if rule is not None:
            swap_back(module)
        around: tuple[Around, ...] = (discarding_products if self.recompute in ("all", "layer") else discarding,)
        if self.recompute == "layer" and module is not self.model and self._is_layer(module):
            around = (as_layer,)
        if module is not self.model and not any(map(_writes, modules_of(module))):
            around += (selecting,)
        # A class that cannot be subclassed has no rule either: nothing is undone then.
        with contextlib.suppress(NotSwapped):
            swap(module, rule or Within(), around)

    def _is_layer(self, module: nn.Module) -> bool:
        """Whether a norm in it is converted, as in layers, and not in most experts."""
        return any(isinstance(self.rules.get(below), Norm) for below in modules_of(module))


def _backend_of(model: nn.Module) -> str:
    """The backend that serves the model's device; on a device that none of ours is for, torch's own code does."""
    device = next((t.device.type for t in tensors_of(model, buffers=True)), "cpu")
    return backends.selected_name(device) if device in ("cpu", "cuda") else "reference"


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward not in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def _writes(module: nn.Module) -> bool:
    """Whether it writes to what it was given, or to its own buffers, which must not happen twice."""
    return is_set(module, "inplace") or is_set(module, "track_running_stats")
