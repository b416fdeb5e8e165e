"""Modules whose own forward is replaced by one in which what belongs together is one call.

The graph of the forward is taken for the kind of arguments that it is called with, and once for each kind. Where there
is none to be had, or nothing in it fuses, the original forward runs.
"""

import itertools
import linecache
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .fusion import fuse
from .swap import Rule
from .tracing import Untraceable, has_hooks, is_constant, signature, trace

# A module that is called in more ways than this is left to its original forward in all further ones.
MOST_GRAPHS = 16

_numbers = itertools.count()


class _Function(NamedTuple):
    """Of the module and the arguments that are no constants; good as long as these settings are as they were."""

    of: Callable[..., Any]
    settings: list[tuple[str, str, Any]]


class Traced(Rule):
    """What fuses in the method of one module.

    Args:
        method: its name.
        inlined: names of modules below whose own forward becomes part of the graph.
        left_alone: names of modules below that are not to be touched.
        recompute: what MLPs found in it keep, "block", "output" or "all".
        found: what was found in it when it was converted, for people.
    """

    def __init__(
        self, method: str, inlined: Sequence[str], left_alone: Sequence[str], recompute: str, found: Sequence[str]
    ) -> None:
        self.methods = (method,)
        self.inlined = tuple(inlined)
        self.left_alone = tuple(left_alone)
        self.recompute = recompute
        self.found = tuple(found)
        self._functions: dict[Hashable, _Function | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_functions": {}}

    def call(self, method: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = getattr(module.original, method)
        if torch.compiler.is_compiling():
            return original(module, *args, **kwargs)
        inlined = [module.get_submodule(name) for name in self.inlined] if self.inlined else ()
        key = signature(module, inlined, args, kwargs)
        try:
            function = self._functions[key]
        except KeyError:
            if len(self._functions) >= MOST_GRAPHS:
                return original(module, *args, **kwargs)
            function = self._functions[key] = self._made(method, module, args, kwargs)
        if function is None:
            return original(module, *args, **kwargs)
        if any(getattr(module.get_submodule(name), attribute) != value for name, attribute, value in function.settings):
            del self._functions[key]
            return self.call(method, module, *args, **kwargs)
        return function.of(module, *[a for a in (*args, *kwargs.values()) if not is_constant(a)])

    def _made(self, method: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> "_Function | None":
        # A module that has got hooks is called as a whole.
        inlined = [name for name in self.inlined if not has_hooks(module.get_submodule(name))]
        try:
            graph, settings = trace(getattr(module.original, method), module, inlined, args, kwargs)
        except Untraceable:
            return None
        found = fuse(graph, module, self.left_alone, self.recompute)
        return _Function(_compiled(graph), settings) if found.names else None

    def __str__(self) -> str:
        counts = {name: self.found.count(name) for name in self.found}
        return "; ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    name = f"<ckpt_kernels.convert graph {next(_numbers)}>"
    # So that a traceback shows the lines.
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
    made = dict(code.globals)
    exec(compile(code.src, name, "exec"), made)
    return made["forward"]
