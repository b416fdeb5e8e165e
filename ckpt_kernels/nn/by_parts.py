"""Decides whether a module may make one fused call, or must call its parts one by one.

A fused call reads the parameters of the parts and does not call them. It would skip their hooks, which may turn inputs
into DTensors (`ColwiseParallel`), gather weights (FSDP2) or compute weights (pruning). It would also skip a replaced
forward, such as an adapter's.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from .. import functional as F
from ..recompute import discard_outputs
from .row_norm import LayerNorm, RMSNorm

_FORWARDS = (nn.Linear.forward, LayerNorm.forward, RMSNorm.forward)


def are_plain(*parts: nn.Module) -> bool:
    """Whether a call of each part runs the class's forward, without hooks."""
    global_hooks: Any = module_globals
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return False
    if global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks:
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
    """A context in which parts called one by one keep about the same tensors as the fused call at that level."""
    if recompute == "block":
        return contextlib.nullcontext()
    return discard_outputs(module, products=recompute == "all")


def apply_dropout(input: Tensor, dropout: float, training: bool) -> Tensor:
    return F.bias_act(input, dropout_p=dropout) if dropout and training else input
