"""Who computes: ours on each backend, eager torch, torch.compile, torch.utils.checkpoint, and peers that import."""

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ckpt_kernels import backends, use_backend

from .cases import Case


@dataclass
class Provider:
    """`fn` computes the case's outputs; `context` is entered around its forward and backward pass."""

    name: str
    fn: Callable[..., Sequence[Tensor]]
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext


def _checkpointed(case: Case) -> Callable[..., Sequence[Tensor]]:
    return lambda *operands: checkpoint(case.eager, *operands, use_reentrant=False)


def _liger(case: Case) -> Callable[..., Sequence[Tensor]] | None:
    """Liger-Kernel's own, where the case is one that it has; its kernels are for GPUs."""
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return None
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if case.name == "layer_norm":
        return lambda x, w, b: (LigerLayerNormFunction.apply(x, w, b, 1e-5),)
    if case.name == "rms_norm":
        return lambda x, w: (LigerRMSNormFunction.apply(x, w, 1e-6),)
    return None


def _quack(case: Case) -> Callable[..., Sequence[Tensor]] | None:
    """quack's own, where the case is one that it has."""
    if importlib.util.find_spec("quack") is None or not torch.cuda.is_available():
        return None
    from quack import rmsnorm

    if case.name == "rms_norm":
        return lambda x, w: (rmsnorm(x, w, eps=1e-6),)
    return None


def providers(case: Case, device: str, dtype: torch.dtype, compiled: bool = True) -> list[Provider]:
    """All that can serve this case here. Ours on the backend that is chosen by itself comes first."""
    chosen = backends.selected_name(device, dtype)
    names = [chosen, *(name for name in backends.NAMES if name != chosen)]
    found = [
        Provider(f"ours ({name})", case.ours, lambda name=name: use_backend(name))
        for name in names
        if backends.why_not(name, device, dtype) is None and name != "reference"
    ]
    found.append(Provider("eager", case.eager))
    if compiled:
        found.append(Provider("torch.compile", torch.compile(case.eager, dynamic=False)))
    found.append(Provider("checkpoint", _checkpointed(case)))
    for name, fn in (("Liger", _liger(case)), ("quack", _quack(case))):
        if fn is not None:
            found.append(Provider(name, fn))
    return found
