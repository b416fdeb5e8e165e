"""Measures the tensors that a call keeps for backward, in bytes and as a list."""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..nested_values import tensors_in


def saved_bytes(fn: Callable[..., Any], /, *args: Any, parameters_of: nn.Module | None = None, **kwargs: Any) -> int:
    """The bytes of the distinct storages that `fn(*args, **kwargs)` keeps for backward.

    Each storage counts once and whole, even if several views of it are kept. The storages of parameters (of any
    `nn.Parameter` that is kept, also through a view) and of all parameters and buffers of the module `parameters_of` do
    not count. Kept inputs do count. The call is made once, with gradients enabled or disabled as they are. Tensors that
    the graph of the result holds are counted, and the result is dropped. A `discard_outputs` around this call has no
    effect; one within `fn` has.

    Args:
        fn: a function or a module.
        args, kwargs: the arguments of `fn`.
        parameters_of: the module whose parameters and buffers do not count; by default `fn`, if that is a module.

    Returns:
        The number of bytes, as an int.

    Raises:
        TypeError: `fn` is not callable, or `parameters_of` is no module.

    Example:
        >>> x = torch.randn(8, 64, requires_grad=True)
        >>> saved_bytes(torch.relu, x) == x.nbytes  # relu keeps its output
        True
    """
    return sum(tensor.counted for tensor in saved_tensors(fn, *args, parameters_of=parameters_of, **kwargs))


def saved_bytes_beside_output(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """`saved_bytes` without the first tensor of the result, which a reader of the result keeps anyway.

    So an activation that saves its output (relu, tanh) is not charged for a tensor that the next layer saves too.

    Args:
        fn: a function or a module.
        args, kwargs: the arguments of `fn`.

    Returns:
        The number of bytes, as an int.

    Example:
        >>> x = torch.randn(8, 64, requires_grad=True)
        >>> ckpt_kernels.memory.saved_bytes_beside_output(torch.relu, x)
        0
    """
    return sum(tensor.counted for tensor in _saved(fn, args, kwargs, _module(fn), but_for_output=True))


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that is kept.

    Attributes:
        module: the name of the module that keeps the tensor; "" is the whole model.
        shape: the shape of the tensor.
        dtype: the dtype of the tensor, without "torch.".
        counted: the bytes of the storage for the first tensor that keeps the storage, 0 for later ones.
        owner: the name of the module that kept the storage first.
    """

    module: str
    shape: tuple[int, ...]
    dtype: str
    counted: int
    owner: str


def saved_tensors(
    fn: Callable[..., Any], /, *args: Any, parameters_of: nn.Module | None = None, **kwargs: Any
) -> list[SavedTensor]:
    """The tensors that `fn(*args, **kwargs)` keeps for backward, in order; see `saved_bytes`.

    Args:
        fn: a function or a module.
        args, kwargs: the arguments of `fn`.
        parameters_of: the module whose parameters and buffers do not count; by default `fn`, if that is a module.

    Returns:
        A list of `SavedTensor`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
        >>> for kept in ckpt_kernels.memory.saved_tensors(model, torch.randn(8, 64)):
        ...     print(kept.module, kept.shape, kept.counted)
        0 (8, 64) 2048
        1 (8, 64) 2048
    """
    owner = _module(fn) if parameters_of is None else parameters_of
    return _saved(fn, args, kwargs, owner, but_for_output=False)


def _module(fn: Callable[..., Any]) -> nn.Module | None:
    return fn if isinstance(fn, nn.Module) else None


def _saved(
    fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any], parameters_of: nn.Module | None, but_for_output: bool
) -> list[SavedTensor]:
    if not callable(fn):
        raise TypeError(f"fn is {type(fn).__name__}; expected a function or a module")
    modules: list[str] = [""]
    if parameters_of is not None and not isinstance(parameters_of, nn.Module):
        raise TypeError(f"parameters_of is {type(parameters_of).__name__}; expected a torch.nn.Module or None")
    owned: set[StorageWeakRef] = set()
    if parameters_of is not None:
        tensors = (*parameters_of.parameters(), *parameters_of.buffers())
        owned.update(*(_storages(tensor) for tensor in tensors if not is_lazy(tensor)))
    packed: list[tuple[str, weakref.ref[_PackedTensor]]] = []

    def pack(tensor: Tensor) -> _PackedTensor:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            owned.update(_storages(tensor))
        entry = _PackedTensor(tensor)
        packed.append((modules[-1], weakref.ref(entry)))
        return entry

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor), _naming(fn, modules):
        result = fn(*args, **kwargs)
    if but_for_output:
        owned.update(*map(_storages, itertools.islice(tensors_in(result), 1)))
    # The tensors that the graph still holds: some may have been discarded since they were packed.
    kept = [(module, reference()) for module, reference in packed]
    saved: list[SavedTensor] = []
    owners: dict[StorageWeakRef, str] = {}
    for module, entry in kept:
        if entry is None:
            continue
        tensor = entry.tensor
        storages = {storage: size for storage, size in _storages(tensor).items() if storage not in owned}
        if not storages or tensor.numel() == 0:
            continue
        counted = sum(size for storage, size in storages.items() if storage not in owners)
        owner, *_ = [owners.setdefault(storage, module) for storage in storages]
        dtype = str(tensor.dtype).removeprefix("torch.")
        saved.append(SavedTensor(module, tuple(tensor.shape), dtype, counted, owner))
    del result
    return saved


class _PackedTensor:
    """A tensor that lives as long as a graph holds it. Detached, because a node that keeps its output would keep itself
    alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@contextlib.contextmanager
def _naming(fn: Callable[..., Any], modules: list[str]) -> Iterator[None]:
    """A context in which the last of `modules` is the name of the module whose forward pass runs.

    The call of all modules is replaced, and hooks are not used: a converted module with hooks, or with global module
    hooks, computes differently.
    """
    if not isinstance(fn, nn.Module):
        yield
        return
    names = {module: name for name, module in fn.named_modules()}
    call = nn.Module.__call__

    def named(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        # A compiler traces this function, and the graph must not depend on measurements.
        if torch.compiler.is_compiling() or module not in names:
            return call(module, *args, **kwargs)
        modules.append(names[module])
        try:
            return call(module, *args, **kwargs)
        finally:
            modules.pop()

    # Tells converted modules that this replaced call is not foreign code.
    vars(named)["only_names_modules"] = True
    modules_of_torch: Any = nn.Module
    modules_of_torch.__call__ = named
    try:
        yield
    finally:
        modules_of_torch.__call__ = call


def _storages(tensor: Tensor) -> dict[StorageWeakRef, int]:
    """The bytes of the storages that hold a tensor: of a DTensor, a jagged or a sparse tensor, those of the tensors
    inside.

    Known by a weak reference and not by an address: on the meta device every address is 0, and memory that is freed
    while the call runs is used again.
    """
    inner = _parts(tensor)
    if inner is not None:
        return {storage: size for part in inner for storage, size in _storages(part).items()}
    storage = tensor.untyped_storage()
    return {StorageWeakRef(storage): storage.nbytes()}


def _parts(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that a tensor without a storage of its own consists of; None for a tensor with a storage."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        # Some parts are no tensors, such as a DTensor's mesh since torch 2.13.
        return [part for name in names if isinstance(part := getattr(tensor, name), Tensor)]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return None if tensor.layout is torch.strided else []
