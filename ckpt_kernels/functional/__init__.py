"""The blocks as functions: torch.nn.functional's own signatures, with keyword-only extras.

Each computes its whole chain in one kernel, and keeps for backward only what its docstring says; what is in
between is computed again in the backward kernel. Arithmetic is in float32 (float64 for float64 input), whatever
the dtype of the input (float32, bfloat16, float16, float64); outputs have the input's dtype. Weights and biases
may be of another floating dtype. Under CUDA autocast the inputs of row norms and group norms are cast to float32, as
those of torch's own are; under any autocast two tensors that meet (input and residual, gate and value) are brought to
their common dtype, as a sum or product of them would be.

An `activation` is a name (see `ckpt_kernels.activations.NAMES`), or the torch module or function that means the
same. Errors, before anything is computed: RuntimeError for tensors of wrong shape, dtype or device, which for integers,
booleans and complex numbers is a NotImplementedError, as torch's is; ValueError for an unknown activation, another
unknown name, and a probability outside [0, 1]; TypeError for what is not a tensor, a number, or, as in torch's own
functions, a bool where one is expected. The error names the argument, what came, and what was expected.

Examples run after `import torch`, `import ckpt_kernels`, `from ckpt_kernels import functional as F` and
`from ckpt_kernels.memory import saved_bytes`.
"""

import torch

from .add_row_norm import add_layer_norm, add_rms_norm
from .bias_act import bias_act
from .channel_norm import batch_norm, group_norm, instance_norm
from .dyt import dyt
from .gated_row_norm import gated_rms_norm
from .glu import glu, packed_glu
from .linear import act_linear, norm_linear
from .linear_loss import linear_cross_entropy
from .mlps import gated_mlp, mlp
from .modulated_row_norm import modulated_layer_norm, modulated_rms_norm
from .rotary import rotary, rotary_qk
from .row_norm import layer_norm, rms_norm

__all__ = [
    "act_linear",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "bias_act",
    "dyt",
    "gated_mlp",
    "gated_rms_norm",
    "glu",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear_cross_entropy",
    "mlp",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "norm_linear",
    "packed_glu",
    "rms_norm",
    "rotary",
    "rotary_qk",
]

# Where torch.fx traces, a call of these is a node of the graph, as one of torch.nn.functional's is.
for _name in __all__:
    torch.fx.wrap(_name)
