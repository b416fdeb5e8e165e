"""Linear layers whose class multiplies and adds the bias in a forward of its own, such as Falcon's."""

import ast
import types

from torch import nn
from torch.nn.parameter import is_lazy

from .code.memoization import memoized
from .code.source import NoSource, decorator_chain, definition_of
from .loads import has_children

_PRODUCTS = frozenset(("linear", "matmul", "mm"))


def adds_bias(module: nn.Module) -> bool:
    """Whether it has a matrix and a bias, no children, and both a matrix product and a sum in its forward.

    It decides what is worth a look, and nothing about what is right.
    """
    held = [p for p in module._parameters.values() if p is not None and not is_lazy(p)]
    if has_children(module) or sorted(p.dim() for p in held) != [1, 2]:
        return False
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        return False
    try:
        return _is_product_and_sum(decorator_chain(forward)[-1])
    except NoSource:
        return False


@memoized
def _is_product_and_sum(forward: types.FunctionType) -> bool:
    nodes = list(ast.walk(definition_of(forward).tree))
    operators = {type(node.op) for node in nodes if isinstance(node, ast.BinOp)}
    called = {ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)}
    return ast.Add in operators and (ast.MatMult in operators or not _PRODUCTS.isdisjoint(called))
