"""Finds the modules whose class must stay, because code of a module around them reads classes of modules."""

from torch import nn

from .code.child_classes import inspects_classes_inside
from .module_tree import children_of, modules_of
from .swap import original_of


def inspected_modules(model: nn.Module) -> set[nn.Module]:
    """All modules below one whose forward tells classes from subclasses, as `type(layer) is nn.LayerNorm` does."""
    inspecting = (module for module in modules_of(model) if inspects_classes_inside(original_of(module)))
    return {below for module in inspecting for child in children_of(module) for below in modules_of(child)}
