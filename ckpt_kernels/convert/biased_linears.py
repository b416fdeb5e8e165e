"""Recognises linear layers with a forward of their own that multiplies and then adds the bias, such as Falcon's."""

import ast
import types

from torch import nn
from torch.nn.parameter import is_lazy

from .code.memoization import memoized
from .code.source import NoSource, decorator_chain, definition_of
from .module_tree import children_of

_PRODUCTS = frozenset(("linear", "matmul", "mm"))


def adds_bias(module: nn.Module) -> bool:
    """Whether the module has a matrix, a bias and no children, and a forward with a matrix product and a sum.

    The answer decides whether the module's methods are read, and has no influence on results.
    """
    parameters = [p for p in module._parameters.values() if p is not None and not is_lazy(p)]
    if children_of(module) or sorted(p.dim() for p in parameters) != [1, 2]:
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
