"""The blocks as modules: torch.nn's own constructors and state_dict keys, plus `activation=`."""

from .row_norm import AddLayerNorm, AddRMSNorm, GatedRMSNorm, LayerNorm, ModulatedLayerNorm, ModulatedRMSNorm, RMSNorm

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "GatedRMSNorm",
    "LayerNorm",
    "ModulatedLayerNorm",
    "ModulatedRMSNorm",
    "RMSNorm",
]
