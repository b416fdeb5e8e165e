"""The closure variables of a rewritten method, through which its new code reaches functions."""

import ast
from collections.abc import Callable
from typing import Any

from ..code.frames import PREFIX
from ..code.syntax_trees import at


class Closure:
    """Closure variables, with their `values` by name."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def variable(self, value: Any) -> ast.expr:
        """The variable with this value."""
        name = next((name for name, known in self.values.items() if known is value), f"{PREFIX}{len(self.values)}")
        self.values[name] = value
        return ast.Name(name, ast.Load())

    def mapped(self, callee: ast.expr, mapping: Callable[[Any], Any]) -> ast.expr:
        """The expression `mapping(callee)`."""
        return at(callee, ast.Call(self.variable(mapping), [callee], []))
