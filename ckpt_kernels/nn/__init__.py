"""The blocks as modules: torch.nn's own constructors and state_dict keys, plus `activation=`."""

from .bias_act import BiasAct
from .glu import GLU
from .row_norm import AddLayerNorm, AddRMSNorm, GatedRMSNorm, LayerNorm, ModulatedLayerNorm, ModulatedRMSNorm, RMSNorm

__all__ = [
    "GLU",
    "AddLayerNorm",
    "AddRMSNorm",
    "BiasAct",
    "GatedRMSNorm",
    "LayerNorm",
    "ModulatedLayerNorm",
    "ModulatedRMSNorm",
    "RMSNorm",
]
