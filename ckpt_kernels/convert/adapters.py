"""Recognises adapters: modules with trained matrices beside a frozen one, such as LoRA's."""

from torch import nn
from torch.nn.parameter import is_lazy

from .module_tree import children_of, modules_of

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)


def is_adapter(module: nn.Module) -> bool:
    """Whether the modules inside hold both frozen and trained matrices, and are nested in containers only, as in LoRA.

    Matrices have two dimensions, so that adapters of convolutions are not found. The answer decides whether the
    module's methods are read, and has no influence on results.
    """
    trained: set[bool] = set()
    for below in modules_of(module):
        if below is module:
            continue
        if children_of(below) and not isinstance(below, _CONTAINERS):
            return False
        parameters = (p for p in below._parameters.values() if p is not None and not is_lazy(p))
        trained.update(p.requires_grad for p in parameters if p.dim() == 2)
    return trained == {False, True}
