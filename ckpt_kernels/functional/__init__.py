"""The blocks as functions with the signatures of torch.nn.functional, extended by keyword-only arguments.

Each function computes its whole chain in one kernel, and keeps for backward only the tensors that its docstring lists;
the backward kernel computes intermediate results again. Inputs are float32, bfloat16, float16 or float64. Arithmetic is
in float32, or in float64 for float64 inputs. Outputs have the input's dtype. Weights and biases may have another
floating dtype. Under CUDA autocast the inputs of row norms and group norms are cast to float32, as for torch's norms.
Under any autocast two operands of a sum or product (input and residual, gate and value) are cast to their common dtype,
as torch's sums and products promote them.

An `activation` is a name (see `ckpt_kernels.activations.NAMES`), or the equivalent torch module or function.

Errors are raised before anything is computed: RuntimeError for tensors of wrong shape, dtype or device, or its subclass
NotImplementedError for integers, booleans and complex numbers, as in torch; ValueError for an unknown activation
or other name, and for a probability outside [0, 1]; TypeError for an argument of another type, such as a flag that is
not a bool. An error names the argument, what came, and what was expected.

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

# torch.fx records a call of these as one node of the graph, as a call of torch.nn.functional.
for _name in __all__:
    torch.fx.wrap(_name)
