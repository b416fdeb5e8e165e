"""Recompute levels by module, from a mapping of names or from a plan, and the context that runs a module at a level."""

import dataclasses
import functools
import itertools
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..levels import (
    NONE,
    OF_LAYERS,
    OF_MODELS,
    OF_MODULES,
    Policy,
    discards_outputs,
    level_of_blocks,
    runs_layers_again,
)
from ..recompute import run_at
from ..runs import Place, run_in
from .forward_contexts import (
    checkpointed,
    checkpointing_selectively,
    convert_late_modules_if_outermost,
    takes_checkpoints,
)
from .layers import count_matrices, has_forward, layers_of
from .module_tree import modules_of, named_modules, names_fitting
from .rules.rule import Forward
from .selection import Choice, Selection


@dataclass(frozen=True)
class AtLevel:
    """The context that runs the forward of a module at a level of its own.

    Attributes:
        level: one of `OF_LAYERS`.
        places: the module's place in a checkpointed run (see `runs`), and in runs within that run; () is none.
        may_repeat: whether the forward may run twice under torch.compile.
    """

    level: str
    places: tuple[Place, ...] = ()
    may_repeat: bool = False

    def __call__(self, forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        convert_late_modules_if_outermost(module)
        if torch.compiler.is_compiling():
            return self._compiled(forward, module, args, kwargs)
        if not self.places:
            return run_at(self.level, functools.partial(forward, module), module, args, kwargs)
        return run_in(self.places, functools.partial(self._in_checkpoint, forward, module), module, args, kwargs)

    def _in_checkpoint(self, forward: Forward, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not discards_outputs(self.level):
            return forward(module, *args, **kwargs)
        return run_at(self.level, functools.partial(forward, module), module, args, kwargs, alone=True)

    def _compiled(self, forward: Forward, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.may_repeat or not (self.places or discards_outputs(self.level)):
            return forward(module, *args, **kwargs)
        if self.places and takes_checkpoints():
            return checkpointed(forward, module, args, kwargs)
        return checkpointing_selectively(forward, module, args, kwargs)


class LevelSource(Protocol):
    """An object that chooses levels for the modules of a model, such as a plan."""

    def levels_in(self, model: nn.Module) -> Mapping[str, tuple[str, tuple[Place, ...]]]:
        """By the modules' names: the level, as a string, and the module's places in checkpointed runs."""
        ...


class Levels:
    """The level of each module of a model.

    Attributes:
        named: the levels and places of modules that were named; each level holds for all modules below, too.
        whole: the level of all other modules.
        is_by_module: whether levels were given by module.

    Args:
        model: a module.
        recompute: one level for all modules, levels by names of modules (with * and ?), or a plan.

    Raises:
        TypeError: `recompute` is none of these.
        ValueError: a level is unknown, or a name fits no module.
    """

    def __init__(self, model: nn.Module, recompute: "str | Mapping[str, str] | LevelSource") -> None:
        self.named: dict[nn.Module, tuple[Policy, tuple[Place, ...]]] = {}
        self._level: dict[nn.Module, str] = {}
        is_level = isinstance(recompute, str)
        if is_level and Policy.read(recompute, OF_MODELS) is None and Policy.read(recompute, OF_MODULES):
            raise ValueError(
                f"recompute is {recompute!r}, a level of single modules; expected one of {', '.join(OF_MODELS)}, or a "
                f"mapping of names, such as {{'layers.*': {recompute!r}}}"
            )
        whole = recompute if is_level else getattr(recompute, "whole", None)
        known = OF_MODELS if is_level else OF_LAYERS
        self.whole = Policy.of("output" if whole is None else whole, known, "recompute")
        self.is_by_module = whole is None
        if isinstance(recompute, Mapping):
            self._assign(model, recompute)
        elif hasattr(recompute, "levels_in"):
            names = dict(named_modules(model, duplicates=True))
            for name, (level, places) in recompute.levels_in(model).items():
                policy = Policy.of(level, OF_LAYERS, f"the level of {name!r}")
                if name not in names:
                    raise ValueError(f"recompute has a level for {name!r}; expected names of modules")
                self._set_level(names[name], policy, places)
        elif not is_level:
            raise TypeError(
                f"recompute is {type(recompute).__name__}; expected a level, a mapping of names to levels, or a plan"
            )

    def _assign(self, model: nn.Module, levels: Mapping[str, str]) -> None:
        names = dict(named_modules(model, duplicates=True))
        layers = functools.cache(lambda: {layer for layer in layers_of(model).values() if count_matrices(layer) > 1})
        for pattern, level in levels.items():
            if not isinstance(pattern, str):
                raise TypeError(f"recompute has the key {pattern!r}; expected names of modules, with * and ?")
            policy = Policy.of(level, OF_MODULES, f"recompute[{pattern!r}]")
            fitting = [names[name] for name in names_fitting(names, pattern)]
            if not fitting:
                raise ValueError(f"recompute names {pattern!r}; expected a name, with * and ?, that fits a module")
            below: set[nn.Module] = set()
            for module in itertools.chain.from_iterable(map(_called, fitting)):
                if module in below:
                    continue
                below.update(modules_of(module))
                places = (Place(len(self._level), 0, True),) if policy.is_checkpoint else ()
                self._set_level(module, policy.inside(), places)
                if runs_layers_again(policy.level):
                    self._set_layers_inside(layers(), module, policy)

    def _set_layers_inside(self, layers: Container[nn.Module], module: nn.Module, policy: Policy) -> None:
        """Gives the level "layer" to the layers inside a module; around them the level "all" keeps the same."""
        layers_inside = [] if module in layers else [inside for inside in modules_of(module) if inside in layers]
        if not layers_inside:
            return
        self._set_level(module, dataclasses.replace(policy, level=level_of_blocks(policy.level)), ())
        for layer in layers_inside:
            self._set_level(layer, policy, ())

    def _set_level(self, module: nn.Module, policy: Policy, places: tuple[Place, ...]) -> None:
        """Sets the level of a module and of all modules below, in place of earlier levels there."""
        for below in modules_of(module):
            self.named.pop(below, None)
            self._level[below] = policy.level
        self.named[module] = policy, places

    def of(self, module: nn.Module) -> str:
        """The level of a module, from the last name given for that module or for one around."""
        return self._level.get(module, self.whole.level)

    @property
    def has_tiles(self) -> bool:
        """Whether a level states a number of tiles."""
        return any(policy.tiles for policy in (self.whole, *(policy for policy, _ in self.named.values())))

    @property
    def has_offloaded(self) -> bool:
        """Whether a level moves saved tensors to host memory."""
        return any(policy.is_offloaded for policy, _ in self.named.values())

    def __str__(self) -> str:
        if not self.is_by_module:
            return str(self.whole)
        counts: dict[str, int] = {}
        for policy, places in self.named.values():
            kind = f"checkpointed {policy}" if places else str(policy)
            counts[kind] = counts.get(kind, 0) + 1
        return "by module: " + (", ".join(f"{count} x {kind}" for kind, count in counts.items()) or "none")


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module; of a list or dict of modules, which is never called, the members."""
    if has_forward(module):
        yield module
        return
    for member in module._modules.values():
        if member is not None:
            yield from _called(member)


class ConvertibleModules(Selection):
    """The selected modules whose level is not "none"."""

    def __init__(self, model: nn.Module, include: Choice, exclude: Choice, levels: Levels) -> None:
        super().__init__(model, include, exclude)
        self._levels = levels

    def why_not(self, module: nn.Module) -> str:
        return super().why_not(module) or ("not selected" if self._levels.of(module) == NONE else "")
