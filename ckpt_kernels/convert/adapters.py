"""Adapters: modules in which trained matrices stand beside a frozen one, such as LoRA's."""

from torch import nn
from torch.nn.parameter import is_lazy

from .module_tree import modules_of

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)


def is_adapter(module: nn.Module) -> bool:
    """Whether it has both frozen and trained matrices in it, and nothing deeper than containers, as LoRA's have.

    Of two dimensions: convolutions with adapters are not found. It decides what is worth a look, and nothing about what
    is right.
    """
    wanted: set[bool] = set()
    for below in modules_of(module):
        if below is module:
            continue
        if any(child is not None for child in below._modules.values()) and not isinstance(below, _CONTAINERS):
            return False
        held = (p for p in below._parameters.values() if p is not None and not is_lazy(p))
        wanted.update(p.requires_grad for p in held if p.dim() == 2)
    return wanted == {False, True}
