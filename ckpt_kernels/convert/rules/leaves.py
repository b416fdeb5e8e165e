"""Converts single norms, activations, dropouts and gates, recognised by what they compute."""

import torch
from torch import nn

from ..forward_contexts import ForwardContext
from ..module_tree import is_parametrized
from ..report import LeftAlone, Replaced
from ..selection import Selection
from ..swap import NotSwapped, may_be_swapped, swap
from .gates import why_no_gate
from .norm_trials import norm_of
from .norms import RowNorm
from .pointwise import pointwise_of
from .rule import Rule

PARAMETRIZED = "its parameters are parametrized"
_IN_BFLOAT16 = "not converted while its {} bfloat16: refuses this dtype, or rounds as none of our row norms does"


class LeafConverter:
    """Converts the selected modules one by one, and records each conversion in a report's lists and in `rules`."""

    def __init__(self, selection: Selection, replaced: list[Replaced], left_alone: list[LeftAlone]) -> None:
        self.selection = selection
        self.replaced = replaced
        self.left_alone = left_alone
        self.rules: dict[nn.Module, Rule] = {}

    def convert(self, name: str, module: nn.Module) -> None:
        """Converts a module that computes a norm, an activation, a dropout or a gate, or records why not."""
        if isinstance(module, torch.jit.ScriptModule):
            return
        rule: Rule | None
        rule, reason = norm_of(module, name)
        if rule is None:
            rule, why_not = pointwise_of(module, name)
            reason = reason or (why_not and (why_no_gate(module) or why_not))
        if rule is None:
            if reason:
                self.leave(name, module, reason)
        elif why := self.selection.why_not(module):
            self.leave(name, module, why)
        elif is_parametrized(module):
            self.leave(name, module, PARAMETRIZED)
        elif "forward" in module.__dict__:
            self.leave(name, module, "its forward was replaced on the instance")
        elif not may_be_swapped(module):
            self.leave(name, module, "its forward is no plain method of its class, or reads its class")
        else:
            self.apply(name, module, rule)
            if isinstance(rule, RowNorm) and not rule.takes_bfloat16:
                self.leave(name, module, _IN_BFLOAT16.format("weights are" if rule.weight else "input is"))

    def apply(self, name: str, module: nn.Module, rule: Rule, contexts: tuple[ForwardContext, ...] = ()) -> None:
        """Converts a module by a rule, within contexts."""
        kind = type(module).__name__
        try:
            swap(module, rule, contexts)
        except NotSwapped as error:
            self.leave(name, module, str(error))
            return
        # An earlier pass may have left the module alone, and a module that was added later may have replaced another
        # one of the same name.
        self.left_alone[:] = [entry for entry in self.left_alone if entry.name != name]
        self.replaced[:] = [entry for entry in self.replaced if entry.name != name]
        self.replaced.append(Replaced(name, kind, str(rule)))
        self.rules[module] = rule

    def leave(self, name: str, module: nn.Module, reason: str) -> None:
        """Records why a module is left alone."""
        self.left_alone.append(LeftAlone(name, type(module).__name__, reason))
