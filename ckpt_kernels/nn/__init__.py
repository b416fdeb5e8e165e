"""The blocks as modules: torch.nn's own constructors and state_dict keys, plus `activation=`."""

from .add_row_norm import AddLayerNorm, AddRMSNorm
from .bias_act import BiasAct
from .channel_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    SyncBatchNorm,
)
from .dyt import DyT
from .gated_row_norm import GatedRMSNorm
from .glu import GLU
from .linear import ActLinear, NormLinear
from .mlp import MLP, GatedMLP
from .modulated_row_norm import ModulatedLayerNorm, ModulatedRMSNorm
from .rotary import Rotary
from .row_norm import LayerNorm, RMSNorm

__all__ = [
    "GLU",
    "MLP",
    "ActLinear",
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BiasAct",
    "DyT",
    "GatedMLP",
    "GatedRMSNorm",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "ModulatedLayerNorm",
    "ModulatedRMSNorm",
    "NormLinear",
    "RMSNorm",
    "Rotary",
    "SyncBatchNorm",
]
