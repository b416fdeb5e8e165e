"""Guesses from the names of classes and attributes that a module is a norm, an activation or a gate. Only the report
uses these guesses, to explain why such a module was left alone."""

import re

from torch import nn

from ..module_tree import children_of

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# torch's elementwise activations.
ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in """CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6
    RReLU SELU Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink Threshold""".split()
)
_NAMED_ACTIVATION = re.compile(r"(lu\d?|act|activation|swish|mish)$", re.IGNORECASE)
_NAMED_GATE = re.compile(r"^gate|Gat(e|ed|ing)(?![a-z])|glu(?![a-z])|_gate|GLU")
_NAMED_ATTRIBUTE = re.compile(
    r"norm|lu\d*$|swish|mish|(^|_)(ln|bn|gn|act|activation|nonlinearity|gate)(_?(fn|func|function|layer|\d+))*$",
    re.IGNORECASE,
)
_NAMED_EXPERTS = re.compile(r"expert|moe(?![a-z])", re.IGNORECASE)


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module without children has a class named like a norm, or is one of torch's norms.

    Torch's parametrizations, such as the one of `weight_norm`, compute parameters.
    """
    is_named = "norm" in type(module).__name__.lower() and not type(module).__module__.startswith("torch.nn.utils.")
    return (is_named or isinstance(module, NORMS)) and not children_of(module)


def looks_like_activation(module: nn.Module) -> bool:
    """Whether a module without children has a class named like an activation or a gate, or is one of torch's
    activations."""
    name = type(module).__name__
    named = _NAMED_ACTIVATION.search(name) or _NAMED_GATE.search(name)
    return (named is not None or isinstance(module, ACTIVATIONS)) and not children_of(module)


def has_name_of_norm_or_activation(name: str) -> bool:
    """Whether a module's name in a model, such as "layers.0.norm1", is that of a norm, an activation or a gate."""
    return _NAMED_ATTRIBUTE.search(name.rpartition(".")[2]) is not None


def looks_like_several(module: nn.Module) -> str:
    """The kind of module, "a norm", "an activation", "a gate" or "experts", after which the class of a module with
    children is named; "" for none."""
    name = type(module).__name__
    if not children_of(module) or type(module).__module__.startswith("torch.nn.modules."):
        return ""
    if _NAMED_EXPERTS.search(name):
        return "experts"
    if _NAMED_GATE.search(name):
        return "a gate"
    if _NAMED_ACTIVATION.search(name):
        return "an activation"
    return "a norm" if "norm" in name.lower() else ""
