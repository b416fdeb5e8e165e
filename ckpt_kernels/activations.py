"""The names of the activations that every block supports, and the torch modules and functions that mean them.

The place of a name in `NAMES` is the code of the activation in the compiled libraries (`CKPT_ACTIVATIONS` in
`csrc/math/activations.h`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

NAMES = (
    "identity",
    "relu",
    "leaky_relu",
    "relu_squared",
    "elu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "mish",
    "sigmoid",
    "tanh",
    "hardswish",
    "softplus",
    "relu6",
    "hardtanh",
)
# Activations whose output has the sign of the input, so that the derivative can be computed from the output.
SIGNED_BY_OUTPUT = ("relu", "leaky_relu")
CODES = {name: code for code, name in enumerate(NAMES)}

Activation = str | nn.Module | Callable[[torch.Tensor], torch.Tensor]

# Torch's functions of these names; gelu is the exact one.
FUNCTIONS = {getattr(module, name): name for module in (F, torch) for name in NAMES if hasattr(module, name)}
FUNCTION_NAMES = frozenset(FUNCTIONS.values())

_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}

_FROM_0_TO_6 = {"min_val": 0.0, "max_val": 6.0}
# For each class of module, the names that a module may mean, and the settings that the module must have for that.
_MODULES: dict[type[nn.Module], dict[str, dict[str, float]]] = {
    nn.Identity: {"identity": {}},
    nn.ReLU: {"relu": {}},
    nn.LeakyReLU: {"leaky_relu": {"negative_slope": 0.01}},
    nn.ELU: {"elu": {"alpha": 1.0}},
    nn.SiLU: {"silu": {}},
    nn.Mish: {"mish": {}},
    nn.Sigmoid: {"sigmoid": {}},
    nn.Tanh: {"tanh": {}},
    nn.Hardswish: {"hardswish": {}},
    nn.Softplus: {"softplus": {"beta": 1.0, "threshold": 20.0}},
    nn.ReLU6: {"relu6": _FROM_0_TO_6},
    nn.Hardtanh: {"relu6": _FROM_0_TO_6, "hardtanh": {"min_val": -1.0, "max_val": 1.0}},
}


def activation_name(activation: Activation, argument: str = "activation") -> str:
    """The name in `NAMES` for an activation that is given as a name, module or function.

    Args:
        activation: a name, or the torch module or function that means the same.
        argument: the name of the argument in the error text.

    Returns:
        The name.

    Raises:
        ValueError: `activation` is anything else, a module with settings of its own included.

    Example:
        >>> from ckpt_kernels.activations import activation_name
        >>> activation_name(torch.nn.GELU(approximate="tanh"))
        'gelu_tanh'
    """
    name = name_of(activation)
    if name is not None:
        return name
    raise ValueError(
        f"{argument} is {activation!r}; expected one of {', '.join(NAMES)}, "
        "or the torch module or function, at its default settings, that means the same"
    )


def name_of(activation: object) -> str | None:
    """The name in `NAMES`; None for any other object, whose attributes are not read."""
    if isinstance(activation, str):
        if activation in CODES:
            return activation
    # Subclasses may compute anything.
    elif type(activation) is nn.GELU:
        return _GELUS.get(activation.approximate) if type(activation.approximate) is str else None
    elif isinstance(activation, nn.Module) and type(activation) in _MODULES:
        for name, settings in _MODULES[type(activation)].items():
            if all(_is_same(getattr(activation, key), value) for key, value in settings.items()):
                return name
    elif callable(activation) and activation in FUNCTIONS:
        return FUNCTIONS[activation]
    return None


def _is_same(setting: object, number: object) -> bool:
    """Whether a setting is a plain number of that value, and not a tensor for example."""
    return type(setting) in (int, float) and setting == number
