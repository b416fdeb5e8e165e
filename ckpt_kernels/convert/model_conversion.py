"""The conversion of one model: chooses a rule for each module, the contexts of their forwards, and reports both."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from .. import backends, offload
from ..levels import discards_outputs, level_of_blocks, runs_layers_again, runs_products_again
from .attribute_loads import is_set
from .forward_contexts import (
    Discarding,
    ForwardContext,
    InTiles,
    as_layer,
    checkpointing_selectively,
    converting_late_modules,
)
from .late_conversion import LateConversion, late_candidates
from .layers import above_lists, count_matrices, has_forward, layers_of, may_not_repeat
from .module_levels import AtLevel, ConvertibleModules, Levels
from .module_tree import children_of, is_parametrized, modules_of, named_modules, nearest, tensors_of
from .report import Report
from .rewriting.methods import RewrittenMethods, rewritten_methods_of
from .rewriting.roles import looks_like_mlp
from .rewriting.sequential import sequential_rule
from .rotations.unrecognized import why_unrecognized
from .rules.heads import Head
from .rules.leaves import PARAMETRIZED, LeafConverter
from .rules.likeness import looks_like_activation, looks_like_several
from .rules.norms import Norm
from .rules.pointwise import KEPT_BY_OUTPUT, name_of
from .rules.rule import ContextOnly, Rule
from .selection import Choice
from .swap import NotSwapped, may_be_swapped, reader_of_class, rule_of, swap, swap_back

_ONE_BY_ONE = "its parts compute one by one: its code matches no known pattern"
_KEEPS_OUTPUT = "keeps only its output, which the next layer keeps too: nothing to gain"
_WRITES_OVER = "writes over its input, so it runs as written; a reader of its output keeps a recipe"


class ModelConversion(LeafConverter):
    """Converts a model that is not converted, and reports what was replaced.

    `tiles` is the number of tiles of MLPs whose level states none.
    """

    def __init__(self, model: nn.Module, levels: Levels, include: Choice, exclude: Choice, tiles: int) -> None:
        super().__init__(ConvertibleModules(model, include, exclude, levels), [], [])
        self.model = model
        self.levels = levels
        self.tiles = tiles
        # All layers share one, because each layer fetches the tensors of the layer before it.
        self.offloading = offload.Offloading(offload.LEAST)
        self.above = above_lists(model)
        # Why the methods of modules that are left alone could not be read or rewritten.
        self.unread: dict[nn.Module, str] = {}
        names = {module: name for name, module in named_modules(model)}
        by_name = {"": levels.of(model)} | {names[module]: levels.of(module) for module in levels.named}
        candidates = late_candidates(model)
        self.late = LateConversion(include, exclude, candidates, self.replaced, self.left_alone, by_name)

    def run(self, heads: Mapping[str, nn.Module]) -> Report:
        """Converts heads, leaves and composite modules, and sets the contexts of roots, in that order, because each
        step depends on the rules of the steps before."""
        self.names = names = {module: name for name, module in named_modules(self.model)}
        for name, module in heads.items():
            if is_parametrized(module):
                self.leave(name, module, PARAMETRIZED)
            else:
                self.apply(name, module, Head())
        for module, name in names.items():
            self.convert(name, module)
        for module, name in names.items():
            if module not in self.rules:
                self._convert_composite(name, module)
        roots = [m for m in self._roots() if discards_outputs(self.levels.whole.level) or m is self.model]
        for module in roots:
            self._set_contexts(module, tuple(self._contexts(module)))
        self.late.begin(self.model, *roots)
        for module, name in names.items():
            self._explain(name, module)
        order = {name: place for place, name in enumerate(names.values())}
        self.replaced.sort(key=lambda entry: order[entry.name])
        self.left_alone.sort(key=lambda entry: order[entry.name])
        return Report(str(self.levels), _backend_of(self.model), self.replaced, self.left_alone)

    def _convert_composite(self, name: str, module: nn.Module) -> None:
        """Converts a composite module, by patterns in the methods, or in the sequence of modules of a Sequential."""
        leaf = not module._modules and type(module).__module__.startswith("torch.nn.modules.")
        if leaf or not self.selection.covers(module):
            return
        if not may_be_swapped(module):
            is_block = len(children_of(module)) > int(is_parametrized(module))
            if is_block and has_forward(module) and (why := _why_class_stays(module)):
                self.unread[module] = why
                self.leave(name, module, why)
            return
        rule: Rule | None = sequential_rule(module, level_of_blocks(self.levels.of(module)), self.selection.covers)
        reason = ""
        if rule is None:
            rule, reason = rewritten_methods_of(module, self.levels.of(module), self.selection.covers)
        self.unread[module] = reason
        if rule is not None:
            self.apply(name, module, rule, self._tiling(name))
        elif has_forward(module) and looks_like_mlp(module, self.selection.covers):
            self.leave(name, module, reason or _ONE_BY_ONE)

    def _explain(self, name: str, module: nn.Module) -> None:
        """Adds a reason to the report for a module that looks convertible, where neither the module nor any module
        inside was converted and the report has no reason yet."""
        if self.selection.covers(module) and (why := why_unrecognized(module)):
            self.leave(name, module, why)
        has_reason = any(entry.name == name for entry in self.left_alone)
        if has_reason or not self.selection.covers(module) or any(m in self.rules for m in modules_of(module)):
            return
        if several := looks_like_several(module):
            self.leave(name, module, f"looks like {several}, and {self.unread.get(module) or _ONE_BY_ONE}")
        elif not self.replaced and looks_like_activation(module):
            writes = is_set(module, "inplace") and name_of(module) not in KEPT_BY_OUTPUT
            self.leave(name, module, _WRITES_OVER if writes else _KEEPS_OUTPUT)

    def _roots(self) -> Iterator[nn.Module]:
        """The modules whose forward gets contexts.

        These are the model and the modules that hold the lists of layers, since each of them may be called without the
        others; and either the modules that have a level of their own, or the layers, since a caller may checkpoint
        layers or call them one by one.
        """
        roots = self.above | dict.fromkeys(self.levels.named)
        for parent in () if self.levels.is_by_module else modules_of(self.model):
            if isinstance(parent, nn.ModuleList):
                roots.update(dict.fromkeys(children_of(parent)))
        if runs_layers_again(self.levels.whole.level) and not self.levels.is_by_module:
            # Members of lists that are single modules, such as linear layers, must remain as they are: fused calls read
            # their weights.
            roots.update(dict.fromkeys(filter(self._is_layer, layers_of(self.model).values())))
        for module in roots:
            covered = self.selection.covers(module) or any(m in self.rules for m in modules_of(module))
            # A module at "none" needs a context too: the module may be in a checkpoint, and keeps outputs that the
            # model around would discard.
            fit = has_forward(module) and may_be_swapped(module) and module not in self.selection.inspected
            if fit and (covered or module in self.levels.named):
                yield module
            elif module in self.levels.named and module not in self.unread:
                self.leave(self.names[module], module, "its forward cannot be given a level of its own")

    def _contexts(self, module: nn.Module) -> Iterator[ForwardContext]:
        """The contexts of a root, the innermost first."""
        whole, is_named = self.levels.whole, module in self.levels.named
        policy, places = self.levels.named.get(module, (whole, ()))
        may_repeat = module not in self.above and not any(map(may_not_repeat, modules_of(module)))
        yield from self._tiling(self.names[module])
        if not discards_outputs(whole.level):
            yield converting_late_modules
        elif is_named:
            yield AtLevel(policy.level, places, may_repeat)
        else:
            is_layer = runs_layers_again(whole.level) and module not in self.above and self._is_layer(module)
            yield as_layer if is_layer else Discarding(products=runs_products_again(whole.level))
            if may_repeat:
                yield checkpointing_selectively
        if is_named and policy.is_offloaded:
            yield self.offloading

    def _tiling(self, name: str) -> tuple[ForwardContext, ...]:
        """The context with the number of tiles of a module, by the nearest module around that has a level."""
        # Either every module has a number of tiles or none, because roots are nested in each other.
        if self.tiles == 1 and not self.levels.has_tiles:
            return ()
        policies = {self.names[module]: policy for module, (policy, _) in self.levels.named.items()}
        policy = policies.get(nearest(name, policies), self.levels.whole)
        return (InTiles(policy.tiles or self.tiles),)

    def _set_contexts(self, module: nn.Module, contexts: tuple[ForwardContext, ...]) -> None:
        rule = rule_of(module)
        if rule is not None:
            swap_back(module)
        # A class that cannot be subclassed has no rule either, so that nothing is lost.
        with contextlib.suppress(NotSwapped):
            swap(module, rule or ContextOnly(), contexts)

    def _is_layer(self, module: nn.Module) -> bool:
        """Whether there are matrices and a norm that is converted: most experts have no norm, and norms have no
        matrix."""
        if not count_matrices(module):
            return False
        rules = [self.rules[m] for m in modules_of(module) if m in self.rules]
        return any(isinstance(rule, Norm) or (isinstance(rule, RewrittenMethods) and rule.has_norm) for rule in rules)


def _why_class_stays(module: nn.Module) -> str:
    if is_parametrized(module):
        return PARAMETRIZED
    reader = reader_of_class(module)
    return f"keeps its class, which {reader} reads" if reader else ""


def _backend_of(model: nn.Module) -> str:
    """The backend that serves the model's device; "reference" for devices that neither Triton nor native serves."""
    device = next((t.device.type for t in tensors_of(model, buffers=True)), "cpu")
    return backends.selected_name(device) if device in ("cpu", "cuda") else "reference"
