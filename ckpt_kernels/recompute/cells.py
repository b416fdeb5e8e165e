"""The cells that autograd nodes hold for saved tensors: with the tensor, with a recipe's claim, or as packed by outer
hooks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .untracked import untracked

_PLAIN = (Tensor, nn.Parameter)


class Operand(Protocol):
    """An operand of a recipe. `depth` is the number of recipes that must run one after the other to get the tensor."""

    @property
    def depth(self) -> int: ...

    def get(self) -> Tensor: ...


@untracked
class Cell:
    """The object that a node holds for a saved tensor. Its content may be replaced by a smaller one.

    The content is a `Kept`, an `OuterPacked` or a `Claim`. `version` is the tensor's version when saved. `watch` shares
    the version counter of the tensor. `is_clone` says that `clone` made the tensor. `attached` holds an object that
    must live as long as the node keeps the cell.
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
        """Whether the tensor has had no in-place write since it was saved."""
        return self.watch is not None and self.watch._version == self.version


@untracked
class Kept:
    """A tensor that is kept, with the version that reveals a later in-place write; see the function `is_plain`."""

    __slots__ = ("is_plain", "tensor", "version")
    depth = 0

    def __init__(self, tensor: Tensor, is_plain: bool) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.is_plain = is_plain

    def get(self) -> Tensor:
        tensor = self.tensor
        if tensor._version != self.version:
            raise version_error(f"{tensor.dtype} {tuple(tensor.shape)}", tensor._version, self.version)
        if self.is_plain and not tensor.data_ptr() and _is_freed(tensor):
            raise RuntimeError(
                f"a weight needed to compute again, {tensor.dtype} {tuple(tensor.shape)}, has been freed; "
                "expected it where its module's backward pass begins (is it sharded apart from what reads its product?)"
            )
        return tensor


class OuterPacked(NamedTuple):
    """A tensor that the saved-tensor hooks around this context packed."""

    packed: Any
    unpack: Callable[[Any], Tensor]

    @property
    def depth(self) -> int:
        return 0

    def get(self) -> Tensor:
        return self.unpack(self.packed)


class Unwritten(NamedTuple):
    """An operand of a recipe that outer hooks keep, and that must not have been written to since.

    Outer hooks may keep no memory of the tensor: a checkpoint recomputes the tensor, with all later writes in it.
    """

    operand: Operand
    watch: Tensor
    version: int

    @property
    def depth(self) -> int:
        return self.operand.depth

    def get(self) -> Tensor:
        if self.watch._version != self.version:
            raise version_error(f"{self.watch.dtype}", self.watch._version, self.version)
        return self.operand.get()


class Absent(NamedTuple):
    """An optional operand that the op did not get, such as the index of a dimension that is taken whole."""

    depth: int = 0

    def get(self) -> Any:
        return None


def version_error(tensor: str, version: int, expected: int) -> RuntimeError:
    return RuntimeError(
        "a tensor needed for the gradient computation was modified by an in-place operation: "
        f"{tensor} is at version {version}; expected version {expected}"
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is dense and no subclass."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested


def version_watch(tensor: Tensor | None) -> Tensor | None:
    """An empty tensor that shares the version counter of `tensor`; None for subclasses and sparse layouts."""
    if tensor is None or not is_plain(tensor):
        return None
    watch = tensor.detach()
    if not tensor.is_meta:
        watch.data = empty_of(tensor.dtype)
    return watch


@functools.cache
def empty_of(dtype: torch.dtype) -> Tensor:
    """The empty data of all version watches of a dtype."""
    return torch.empty(0, dtype=dtype, device="cpu")


def _is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a plain tensor has been freed, as sharding frees gathered weights."""
    return not tensor.is_meta and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
