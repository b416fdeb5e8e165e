"""What stands in the place of a saved tensor: the tensor, what the hooks around made of it, or a recipe's claim."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


class Operand(Protocol):
    """An operand of a recipe; `depth` counts the recipes that run one after the other to get the tensor."""

    @property
    def depth(self) -> int: ...

    def get(self) -> Tensor: ...


class Cell:
    """A node's place for a saved tensor. The content, a `Kept`, a `Foreign` or a recipe's `Claim`, may be exchanged for
    a smaller one.

    `version` is the tensor's version at saving, `watch` shares the tensor's version counter, and `is_clone` says that
    the tensor was made by `clone`. `attached` lives as long as the node keeps the cell.
    """

    __slots__ = ("__weakref__", "attached", "content", "is_clone", "owner", "version", "watch")

    def __init__(self, content: Operand, owner: Any, version: int, watch: Tensor | None) -> None:
        self.content = content
        self.owner = owner
        self.version = version
        self.watch = watch
        self.is_clone = False
        self.attached: Any = None

    def get(self) -> Tensor:
        return self.content.get()

    @property
    def depth(self) -> int:
        return self.content.depth

    def is_unwritten(self) -> bool:
        """Whether nobody has written to the tensor since it was saved."""
        return self.watch is not None and self.watch._version == self.version


class Kept:
    """A tensor that is kept, with the version by which a later write is noticed, and whether it `is_plain`."""

    __slots__ = ("is_plain", "tensor", "version")
    depth = 0

    def __init__(self, tensor: Tensor, is_plain: bool) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.is_plain = is_plain

    def get(self) -> Tensor:
        tensor = self.tensor
        if tensor._version != self.version:
            raise _written(f"{tensor.dtype} {tuple(tensor.shape)}", tensor._version, self.version)
        if self.is_plain and not tensor.data_ptr() and _is_freed(tensor):
            raise RuntimeError(
                f"a weight needed to compute again, {tensor.dtype} {tuple(tensor.shape)}, has been freed; "
                "expected it where its module's backward pass begins (is it sharded apart from what reads its product?)"
            )
        return tensor


class Foreign(NamedTuple):
    """A tensor as packed by the saved-tensor hooks around this context."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    @property
    def depth(self) -> int:
        return 0

    def get(self) -> Tensor:
        return self.unpack(self.packed)


class Unwritten(NamedTuple):
    """An operand of a recipe that hooks around this context keep; the tensor must not have been written to since.

    The hooks may keep no memory of the tensor: a checkpoint makes the tensor again, with all later writes in it.
    """

    operand: Operand
    watch: Tensor
    version: int

    @property
    def depth(self) -> int:
        return self.operand.depth

    def get(self) -> Tensor:
        if self.watch._version != self.version:
            raise _written(f"{self.watch.dtype}", self.watch._version, self.version)
        return self.operand.get()


class Absent(NamedTuple):
    """An operand that an op was not given, such as the index of a dimension that is taken whole."""

    depth: int = 0

    def get(self) -> Any:
        return None


def _written(what: str, found: int, expected: int) -> RuntimeError:
    return RuntimeError(
        "a tensor needed for the gradient computation was modified by an in-place operation: "
        f"{what} is at version {found}; expected version {expected}"
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is no subclass, and dense."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def watching(tensor: Tensor | None) -> Tensor | None:
    """A tensor without memory that shares the version counter of `tensor`."""
    if tensor is None or not is_plain(tensor):
        return None
    watch = tensor.detach()
    if not tensor.is_meta:
        watch.data = nothing(tensor.dtype)
    return watch


@functools.cache
def nothing(dtype: torch.dtype) -> Tensor:
    """The data of what watches."""
    return torch.empty(0, dtype=dtype, device="cpu")


def _is_freed(tensor: Tensor) -> bool:
    """Whether somebody has freed a plain tensor's memory, as sharding does with gathered weights."""
    return not tensor.is_meta and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
