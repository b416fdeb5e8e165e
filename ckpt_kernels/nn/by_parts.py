"""Where the parts of a module are to be called one by one, as torch's Sequential would, and not by one fused call.

A fused call reads the parameters of its parts and passes over the parts themselves. What hangs on their calls would be
left out: hooks, such as those that make inputs DTensors (`ColwiseParallel`), gather weights (FSDP2) or compute them
(pruning); and forwards of their own, such as an adapter's.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as everybody

from .. import functional as F
from ..recompute import discard_outputs
from .row_norm import LayerNorm, RMSNorm

_FORWARDS = (nn.Linear.forward, LayerNorm.forward, RMSNorm.forward)


def are_plain(*parts: nn.Module) -> bool:
    """Whether a call of each part is what its parameters say, and nothing else."""
    hooks: Any = everybody
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    if hooks._global_backward_hooks or hooks._global_backward_pre_hooks:
        return False
    for part in parts:
        held = part.__dict__
        if type(part).forward not in _FORWARDS or "forward" in held:
            return False
        if held["_forward_hooks"] or held["_forward_pre_hooks"]:
            return False
        if held["_backward_hooks"] or held["_backward_pre_hooks"]:
            return False
    return True


def discarding_outputs(module: nn.Module, recompute: str) -> AbstractContextManager[Any]:
    """A context in which parts called one by one keep about the same tensors as the fused call at this level."""
    if recompute == "block":
        return contextlib.nullcontext()
    return discard_outputs(module, products=recompute == "all")


def dropped(input: Tensor, dropout: float, training: bool) -> Tensor:
    return F.bias_act(input, dropout_p=dropout) if dropout and training else input
