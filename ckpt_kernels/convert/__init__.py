"""Real models, one line: `convert(model)` makes a model's own modules compute with this package's kernels.

    report = ckpt_kernels.convert(model)
    print(report)

Norms, activations, dropouts and gates are found by what they compute (`rules`); what belongs together, by how a
module's methods are written (`code`, `rewriting`, `rotations`). A user's code runs on real tensors and on nothing
else, and nothing of one call is remembered for the next. The modules stay the objects they were (`swap`), and
`revert` gives them their own class back.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .. import backends, offload
from ..functional.mlps import tiles_for
from ..levels import level_of_blocks
from ..memory import kept_bytes
from ..model_argument import check_model
from .around import Around, InTiles, as_layer, discarding, discarding_products, looking_over, selecting
from .code.remembering import forget_what_is_local
from .code.writes import writer_in
from .later import Continued, looked_for
from .layers import above_lists, has_forward, layers_of, writes_as_set
from .loads import modules_of, named_modules, tensors_of
from .noticing import forget
from .planned import AtLevel, Levels, Planned, Touched
from .report import LeftAlone, Replaced, Report
from .rewriting.chain import chain_of
from .rewriting.methods import Written, written_of
from .rewriting.values import looks_like_mlp
from .rotations.unknown import why_unknown
from .rules.heads import Head, heads_in
from .rules.leaves import Leaves
from .rules.likeness import looks_like_activation, looks_like_several
from .rules.norms import Norm
from .rules.rule import Rule, Within
from .selection import Choice, choice_of
from .swap import NotSwapped, is_converted, is_wrapped, may_be_swapped, rule_of, swap, swap_back

_ONE_BY_ONE = "its parts compute one by one: it writes them in no form that is known"

__all__ = ["LeftAlone", "Replaced", "Report", "convert", "is_converted", "revert"]


def convert(
    model: nn.Module,
    *,
    recompute: "str | Mapping[str, str] | Planned" = "output",
    include: Iterable[str | type[nn.Module]] | None = None,
    exclude: Iterable[str | type[nn.Module]] | None = None,
    logits: str | None = None,
    tiles: int = 1,
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
            that has norms, and of a Sequential if it has two matrices too, what goes into it and what its attention
            saves of its result (see `recompute.layer`).
            Or levels by module: a `Plan`, or a mapping of modules' names (with * and ?) to levels, each for all that is
            below the module, a later one before an earlier one; of what is not named "output". There a module may
            also be left as it is, "none", or be checkpointed, "checkpoint". All but "none" and "block" may say how many
            tiles there are, "all, tiles=4", and all but "checkpoint" that what is kept waits in host memory, "output,
            offload" (see `offload.offload`).
        include: names of modules (with * and ?) or classes; only these and what is below them. None is all.
        exclude: names or classes of modules to be left alone with all that is below them.
        logits: the name (with * and ?) of the linear layer that makes a language model's logits, such as "lm_head".
            They are then made when somebody looks at them, and a cross entropy reads them in chunks; see
            `ckpt_kernels.logits`.
        tiles: how many parts an MLP takes its rows in, one after the other, where its products are not kept at "block"
            and its level says no other number; see `functional.mlp`.
        inputs: what the model is called with, a tensor, a tuple, or a dict by name. If given, the report has the bytes
            that a forward pass keeps before and after, measured on copies of the model.

    Returns:
        A `Report` of what was replaced and what was left alone, which prints as a table.

    Raises:
        TypeError: `model` is no module, or is compiled already.
        ValueError: the level is unknown; a name fits no module, or that of `logits` one that is no `nn.Linear`; or
            `tiles` is no positive number, or is more than 1 at "block".
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
    check_model(model, "convert")
    levels, heads = Levels(model, recompute), heads_in(model, logits)
    tiles = tiles_for(tiles, levels.whole.level)
    if levels.has_offloaded:
        offload.warn_if_simulated(model)
    choices = choice_of(model, include, "include"), choice_of(model, exclude, "exclude")
    before = None if inputs is None else kept_bytes(model, inputs, revert)
    revert(model)
    try:
        report = _Conversion(model, levels, *choices, tiles).run(heads)
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
        TypeError: `model` is no module.
        RuntimeError: a converted module has been wrapped by a parametrization or by FSDP since, which have to be taken
            off first. Nothing is changed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
        >>> _ = ckpt_kernels.convert(model)
        >>> ckpt_kernels.revert(model)
        >>> type(model[0]) is torch.nn.LayerNorm
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    for name, module in named_modules(model):
        if is_wrapped(module):
            raise RuntimeError(
                f"{name or 'the model'} was converted and has become {type(module).__name__} since; "
                "expected that to be undone before it is reverted or converted again"
            )
    for module in modules_of(model):
        if is_converted(module):
            swap_back(module)
            forget(module)


class _Conversion(Leaves):
    def __init__(self, model: nn.Module, levels: Levels, include: Choice, exclude: Choice, tiles: int) -> None:
        super().__init__(Touched(model, include, exclude, levels), writer_in(model), [], [])
        self.model = model
        self.levels = levels
        self.tiles = tiles
        # One for all layers: each brings back what the one before it keeps.
        self.offloading = offload.Offloading(offload.LEAST)
        self.above = above_lists(model)
        names = {module: name for name, module in named_modules(model)}
        by_name = {"": levels.of(model)} | {names[module]: levels.of(module) for module in levels.named}
        self.later = Continued(include, exclude, looked_for(model), self.replaced, self.left_alone, by_name)

    def run(self, heads: Mapping[str, nn.Module]) -> Report:
        self.names = named = {module: name for name, module in named_modules(self.model)}
        for name, module in heads.items():
            self.apply(name, module, Head())
        for module, name in named.items():
            self.convert(name, module)
        for module, name in named.items():
            if module not in self.rules:
                self._convert_composite(name, module)
        lets_go = self.levels.whole.level != "block"
        roots = [module for module in self._roots() if lets_go or module is self.model]
        for module in roots:
            around = self._around(module) if lets_go else (looking_over,)
            self._surround(module, (*self._in_tiles(module), *around, *self._offloading(module)))
        self.later.begin(self.model, *roots)
        for module, name in named.items():
            self._explain(name, module)
        order = {name: i for i, name in enumerate(named.values())}
        self.replaced.sort(key=lambda entry: order[entry.name])
        self.left_alone.sort(key=lambda entry: order[entry.name])
        return Report(str(self.levels), _backend_of(self.model), self.replaced, self.left_alone)

    def _convert_composite(self, name: str, module: nn.Module) -> None:
        leaf = not module._modules and type(module).__module__.startswith("torch.nn.modules.")
        if leaf or not self.selection.covers(module) or not may_be_swapped(module):
            return
        rule: Rule | None = chain_of(module, level_of_blocks(self.levels.of(module)), self.selection.covers)
        reason = ""
        if rule is None:
            rule, reason = written_of(module, self.levels.of(module), self.selection.covers)
        if rule is not None:
            self.apply(name, module, rule)
        elif looks_like_mlp(module, self.selection.covers):
            self.leave(name, module, reason or _ONE_BY_ONE)

    def _explain(self, name: str, module: nn.Module) -> None:
        """Says why what looks like something of ours is not replaced, where nothing in it is, and nothing was said."""
        if self.selection.covers(module) and (why := why_unknown(module)):
            self.leave(name, module, why)
        known = any(entry.name == name for entry in self.left_alone)
        if known or not self.selection.covers(module) or any(below in self.rules for below in modules_of(module)):
            return
        if several := looks_like_several(module):
            self.leave(name, module, f"looks like {several}, and {_ONE_BY_ONE}")
        elif not self.replaced and looks_like_activation(module):
            self.leave(name, module, "keeps no more than its output, which what reads it keeps too: nothing to win")

    def _roots(self) -> Iterator[nn.Module]:
        """The modules whose forward lets go of outputs: the model, and what of it holds the lists of layers, which may
        be called without it; and the members of these, which may be checkpointed or called one by one, or those that
        have a level of their own."""
        found = self.above | dict.fromkeys(self.levels.named)
        for parent in () if self.levels.is_by_module else modules_of(self.model):
            if isinstance(parent, nn.ModuleList):
                found.update((layer, None) for layer in parent._modules.values() if layer is not None)
        if self.levels.whole.level == "layer" and not self.levels.is_by_module:
            found.update(dict.fromkeys(layers_of(self.model).values()))
        for module in found:
            covered = self.selection.covers(module) or any(m in self.rules for m in modules_of(module))
            # What is to stay as it is may be in a checkpoint, and keeps its outputs within a model that does not.
            if (covered or module in self.levels.named) and may_be_swapped(module) and has_forward(module):
                yield module
            elif module in self.levels.named:
                self.leave(self.names[module], module, "its forward cannot be given a level of its own")

    def _in_tiles(self, module: nn.Module) -> tuple[Around, ...]:
        """How many tiles MLPs in one of the roots take. Where some take several, all say so: one is within another."""
        if self.tiles == 1 and not self.levels.has_tiles:
            return ()
        policy = self.levels.named[module][0] if module in self.levels.named else self.levels.whole
        return (InTiles(policy.tiles or self.tiles),)

    def _around(self, module: nn.Module) -> tuple[Around, ...]:
        """What the forward of one of the roots runs in."""
        may_repeat = module not in self.above and not any(map(writes_as_set, modules_of(module)))
        if module in self.levels.named:
            policy, places = self.levels.named[module]
            return (AtLevel(policy.level, places, may_repeat),)
        whole = self.levels.whole.level
        if whole == "layer" and module not in self.above and self._is_layer(module):
            around: tuple[Around, ...] = (as_layer,)
        else:
            around = (discarding_products if whole in ("all", "layer") else discarding,)
        return (*around, selecting) if may_repeat else around

    def _offloading(self, module: nn.Module) -> tuple[Around, ...]:
        named = self.levels.named.get(module)
        return (self.offloading,) if named is not None and named[0].is_offloaded else ()

    def _surround(self, module: nn.Module, around: tuple[Around, ...]) -> None:
        rule = rule_of(module)
        if rule is not None:
            swap_back(module)
        # A class that cannot be subclassed has no rule either: nothing is undone then.
        with contextlib.suppress(NotSwapped):
            swap(module, rule or Within(), around)

    def _is_layer(self, module: nn.Module) -> bool:
        """Whether a norm in it is converted, as in layers, and not in most experts."""
        rules = [self.rules[below] for below in modules_of(module) if below in self.rules]
        return any(isinstance(rule, Norm) or (isinstance(rule, Written) and rule.has_norm) for rule in rules)


def _backend_of(model: nn.Module) -> str:
    """The backend that serves the model's device; on a device that none of ours is for, torch's own code does."""
    device = next((t.device.type for t in tensors_of(model, buffers=True)), "cpu")
    return backends.selected_name(device) if device in ("cpu", "cuda") else "reference"
