"""Kernels of other libraries: Liger-Kernel, quack, flash-attention and apex, if they can be imported.

All are for GPUs. If a case has an activation after the norm, a peer computes the norm and torch the activation.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[..., Sequence[Tensor]]

_AFTER_A_NORM: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def _liger(block: str) -> Call | None:
    ops = importlib.import_module("liger_kernel.ops")
    return {
        "layer_norm": lambda x, w, b: (ops.LigerLayerNormFunction.apply(x, w, b, 1e-5),),
        "rms_norm": lambda x, w: (ops.LigerRMSNormFunction.apply(x, w, 1e-6),),
        "add_rms_norm": lambda x, residual, w: ops.LigerFusedAddRMSNormFunction.apply(x, residual, w, 1e-6),
        "glu (silu)": lambda gate, value: (ops.LigerSiLUMulFunction.apply(gate, value),),
    }.get(block)


def _quack(block: str) -> Call | None:
    rmsnorm = importlib.import_module("quack").rmsnorm
    return {
        "rms_norm": lambda x, w: (rmsnorm(x, w, eps=1e-6),),
        "add_rms_norm": lambda x, residual, w: rmsnorm(x, w, residual=residual, eps=1e-6, prenorm=True),
    }.get(block)


def _flash_attention(block: str) -> Call | None:
    triton = importlib.import_module("flash_attn.ops.triton.layer_norm")
    return {
        "layer_norm": lambda x, w, b: (triton.layer_norm_fn(x, w, b, eps=1e-5),),
        "rms_norm": lambda x, w: (triton.rms_norm_fn(x, w, None, eps=1e-6),),
        "add_rms_norm": lambda x, r, w: triton.rms_norm_fn(x, w, None, residual=r, eps=1e-6, prenorm=True),
    }.get(block)


def _apex(block: str) -> Call | None:
    apex = importlib.import_module("apex.normalization.fused_layer_norm")
    return {
        "layer_norm": lambda x, w, b: (apex.fused_layer_norm_affine(x, w, b, w.shape, 1e-5),),
        "rms_norm": lambda x, w: (apex.fused_rms_norm_affine(x, w, w.shape, 1e-6),),
    }.get(block)


PEERS: dict[str, Callable[[str], Call | None]] = {
    "Liger": _liger,
    "quack": _quack,
    "flash-attention": _flash_attention,
    "apex": _apex,
}


def peers(case: str) -> Iterator[tuple[str, Call]]:
    """(name, call) of every peer that can be imported here and implements this case."""
    if not torch.cuda.is_available():
        return
    block, _, activation = case.partition("+")
    if activation not in _AFTER_A_NORM:
        return
    after = _AFTER_A_NORM[activation]
    for name, find in PEERS.items():
        try:
            call = find(block)
        except ImportError:
            continue
        if call is not None:
            yield name, (lambda *operands, call=call: (lambda y, *rest: (after(y), *rest))(*call(*operands)))
