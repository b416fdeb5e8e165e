"""Recognises adapters, modules with trained matrices beside a frozen one such as LoRA's, and linear layers with a
forward of their own that multiplies and then adds the bias, such as Falcon's.

The answers decide whether a module's methods are read, and have no influence on results.
"""

import ast
import types

from torch import nn

from .code.memoization import memoized
from .code.source import NoSource, decorator_chain, definition_of
from .module_tree import children_of, modules_of, own_parameters

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)
_PRODUCTS = frozenset(("linear", "matmul", "mm"))


def is_adapter(module: nn.Module) -> bool:
    """Whether the modules inside hold both frozen and trained matrices, and are nested in containers only, as in LoRA.

    Matrices have two dimensions, so that adapters of convolutions are not found.
    """
    trained: set[bool] = set()
    for below in modules_of(module):
        if below is module:
            continue
        if children_of(below) and not isinstance(below, _CONTAINERS):
            return False
        trained.update(p.requires_grad for p in own_parameters(below) if p.dim() == 2)
    return trained == {False, True}


def adds_bias(module: nn.Module) -> bool:
    """Whether the module has a matrix, a bias and no children, and a forward with a matrix product and a sum."""
    if children_of(module) or sorted(p.dim() for p in own_parameters(module)) != [1, 2]:
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
