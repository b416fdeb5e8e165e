"""What a call keeps for its backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes of the distinct storages that `fn(*args, **kwargs)` keeps for backward.

    `fn` may be a function or a module. Each storage counts once and whole, however many views of it are kept.
    Not counted: the storages of parameters (any `nn.Parameter` that is kept, or a view of one) and, if `fn` is a
    module, of its parameters and buffers. Inputs that are kept do count. The call is made once, with gradients
    as they are set, and its result is dropped.
    """
    owned = set()
    if isinstance(fn, nn.Module):
        owned = {_storage(t) for t in (*fn.parameters(), *fn.buffers())}
    kept: dict[int, int] = {}
    # Alive until the end, so that no storage's address is given to another.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor.detach())
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            owned.add(_storage(tensor))
        else:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        # Without its graph: a node that keeps its own output would otherwise keep itself alive.
        return alive[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn(*args, **kwargs)
    total = sum(size for storage, size in kept.items() if storage not in owned)
    del result
    return total


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
