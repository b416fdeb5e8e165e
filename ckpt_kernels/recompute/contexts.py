"""The contexts that discard outputs: saved-tensor hooks that are active on one thread while the context is open."""

import contextlib
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .. import backends
from . import fast_path, nodes
from .active import discarding, innermost, thread
from .announcements import Announced
from .cells import Cell, Kept, empty_of
from .discarder import Discarder
from .entries import Block, Entry
from .hooks import STACK, has_innermost_hooks, seekers, top_hooks
from .recipes import LONGEST_CHAIN, Claim, Recipe
from .rules import GATHERS, KEEPING, PRIVATE_READERS, SAVED_BY, VIEWS, WRITERS
from .transforms import allow_transforms

_is_traced = torch.compiler.is_dynamo_compiling


class discard_outputs(contextlib.ContextDecorator):
    """While active, a reader that saves a block's output for a gradient keeps a recipe for that output instead.

    Also a decorator: `@discard_outputs()` over a function or a `forward`. A context holds for the calling thread. A
    context within another has no effect: the outer one stays active with its own options. An output is kept where a
    recipe would keep as much memory: the output of `bias_act` with the identity, relu or leaky_relu, and that of
    `rotary` without a norm where nobody else keeps the input. Views of an output, and the copies that autocast makes,
    count as the output. After an in-place write to an output, earlier readers get the old values back. Later readers
    keep the tensor, or a recipe that repeats the writes if the graph has all of them.

    Outputs of torch's own cheap ops are discarded too, such as the product in `linear(silu(gate) * value)`. The
    autograd graph must show how the output was made from tensors that the graph keeps anyway, and none of these may
    have been written to where autograd does not see the write. No hook sees writes through `.data` or by foreign
    kernels. Ops that ran before the context do not run again. The recipe keeps a copy of a bias; writes to the bias are
    seen only if `module` is given.

    Kept tensors keep their values. A parameter that is given other data before the backward pass (`p.data = other`)
    gets the gradient for the values that the forward pass used, as with torch's own matrix products. A custom
    autograd.Function that saves a parameter gets the values back and not the object with its attributes, as under all
    saved-tensor hooks.

    torch.func's gradients may begin within the context; inside them torch keeps what it keeps without the context. The
    context does nothing where saved-tensor hooks are disabled around it, where torch.jit.trace records, and within
    torch.compile; for torch.compile see `selective_contexts`.

    Args:
        module: the module whose forward pass runs within the context.
        products: also discard matrix products that `bias_act`, `dyt`, `glu` or `packed_glu` reads. They run again in
            the backward pass. Copies of their biases are kept.
        temporaries: also discard results of ops whose operands nobody keeps, such as the sum in `relu(norm(x) + y)`.
            Set this only if no such operand is written to where autograd does not see the write (under `no_grad` or
            through `detach()`): the graph does not show such a write.

    Kept for backward:
        A recipe instead of an output. The recipe holds the tensors that the block keeps anyway.

    Raises:
        TypeError: `module` is no module.
        RuntimeError: in the backward pass, where a tensor that a recipe needs has been written to in place since.

    Example:
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64, activation="gelu"), torch.nn.Linear(64, 8))
        >>> x = torch.randn(8, 64, requires_grad=True)
        >>> with ckpt_kernels.recompute.discard_outputs():
        ...     loss = model(x).square().mean()
        >>> loss.backward()
        >>> saved_bytes(model, x) - saved_bytes(ckpt_kernels.recompute.discard_outputs()(model), x) == x.nbytes
        True

    Source:
        The trade of compute for memory: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. The
        mechanism: `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self, module: nn.Module | None = None, *, products: bool = False, temporaries: bool = False) -> None:
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"module is {type(module).__name__}; expected a torch.nn.Module or None")
        self._module = module
        self._products = products
        self._temporaries = temporaries
        self._entered: list[Generator[None, None, None] | None] = []

    def _recreate_cm(self) -> "discard_outputs":
        return discard_outputs(self._module, products=self._products, temporaries=self._temporaries)

    def __enter__(self) -> "discard_outputs":
        # Within another active context the outer one stays active: outputs may pass between the two.
        is_idle = torch.compiler.is_compiling() or discarding() is not None
        self._entered.append(None if is_idle else opened(self._module, self._products, self._temporaries))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooked = self._entered.pop()
        if hooked is not None:
            hooked.close()


def opened(module: nn.Module | None, products: bool, temporaries: bool) -> Generator[None, None, None] | None:
    """The context as a generator that has begun, and ends when closed. None where torch allows no such hooks.

    For eager calls outside of all active contexts.
    """
    # A trace would record the operations of the hooks.
    is_recorded = torch._C._get_tracing_state() is not None
    # Torch keeps the saved values of tensors that are written to, which a recipe refuses to read.
    allows_writes = torch.autograd.graph._allow_mutation_on_saved_tensors_enabled
    if is_recorded or allows_writes or not STACK._saved_tensors_hooks_is_enabled():
        return None
    hooked = _hooked(module, products, temporaries)
    next(hooked)
    return hooked


def _hooked(module: nn.Module | None, products: bool, temporaries: bool) -> Generator[None, None, None]:
    """A generator that installs a discarder at the first step and removes the discarder when closed.

    Closing marks the discarder itself, so that closing works wherever the generator is closed: after an interrupt
    between any two steps, when the last reference to the generator goes, or in another thread, whose own hooks stay
    untouched.
    """
    allow_transforms()
    discarder = Discarder(module, products, temporaries)
    outer, pushed_by = discarder.outer, None
    try:
        STACK._push_saved_tensors_default_hooks(fast_path.packing(discarder), fast_path.unpacking(_unpack))
        pushed_by = threading.get_ident()
        thread.active.append(discarder)
        yield
    finally:
        discarder.is_closed = True
        innermost()
        discarder.close()
        if pushed_by == threading.get_ident() and STACK._saved_tensors_hooks_is_enabled():
            _remove_hooks(discarder, outer)
        while (top := top_hooks()) is not None and _is_closed(top):
            STACK._pop_saved_tensors_default_hooks()


def _remove_hooks(discarder: Discarder, outer: tuple[Any, Any] | None) -> None:
    """Removes the hooks of a context, below those that were opened within and stay open.

    If they are gone, hooks that were opened before, `outer`, and closed within have removed them in place of their own.
    """
    inner: list[tuple[Any, Any]] = []
    while not (is_innermost := has_innermost_hooks(discarder)) and (top := top_hooks()) is not None:
        inner.append(top)
        STACK._pop_saved_tensors_default_hooks()
    if is_innermost:
        STACK._pop_saved_tensors_default_hooks()
    elif inner and outer is not None and inner[0][0] is outer[0] and inner[0][1] is outer[1]:
        del inner[0]
    for pair in reversed(inner):
        STACK._push_saved_tensors_default_hooks(*pair)


def _is_closed(pair: tuple[Any, Any]) -> bool:
    """Whether hooks are those of a closed context."""
    owner = getattr(pair[0], "__self__", None)
    return isinstance(owner, Discarder) and owner.is_closed


def use_library(thin: Any) -> None:
    """Lets `thin`, the module `_thin`, pack, record and unpack in the usual cases."""
    graph_task, storage = torch._C._current_graph_task_id, torch.UntypedStorage
    thin.set_up_classes(Announced, Block, Cell, Claim, Discarder, Entry, Kept, Recipe)
    names = SAVED_BY, KEEPING | {nodes.LEAF}, frozenset(VIEWS), WRITERS, PRIVATE_READERS, GATHERS
    thin.set_up_cells(torch.strided, torch.float32, LONGEST_CHAIN, *names, BackwardCFunction)
    top = STACK._top_saved_tensors_default_hooks
    thin.set_up_records(thread, top, backends.chosen, type(threading.RLock()), empty_of)
    thin.set_up_storages(storage._expired, storage._free_weak_ref)
    modes = torch.is_grad_enabled, torch.is_inference_mode_enabled
    thin.set_up_unpacking(_unpack, seekers, graph_task, backends.chosen, *modes)
    fast_path.library = thin


def _unpack(packed: Cell) -> Tensor:
    # Compiled autograd traces through hooks. A tracer cannot handle versions, locks and shared results.
    if _is_traced():
        return _unpack_untraced(packed)
    # `nodes.results_of_function` asks only which node made the tensors, so computing values would be wasted.
    if seekers and threading.get_ident() in seekers:
        return empty_of(torch.float32)
    return packed.content.get()


@torch._disable_dynamo
def _unpack_untraced(packed: Cell) -> Tensor:
    return packed.get()


class DiscardOutputs(nn.Module):
    """A module that runs the forward pass of `module` within `discard_outputs`.

    Args:
        module: any module.

    Raises:
        TypeError: `module` is no module.

    Example:
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.RMSNorm(64), torch.nn.Linear(64, 8))
        >>> model = ckpt_kernels.recompute.DiscardOutputs(model)
        >>> model(torch.randn(8, 64)).shape
        torch.Size([8, 8])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is {type(module).__name__}; expected a torch.nn.Module")
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        with discard_outputs(module):
            return module(*args, **kwargs)


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts for torch.compile, which does not use hooks: they tell the partitioner to recompute blocks and keep the
    rest.

    The compiled model keeps the same tensors as an eager one within `discard_outputs`. By default the partitioner
    considers a block too expensive to run again, and keeps input and output.

    Returns:
        The two contexts that the `context_fn` of `torch.utils.checkpoint.checkpoint` returns.

    Example:
        >>> import functools
        >>> checkpoint = functools.partial(
        ...     torch.utils.checkpoint.checkpoint,
        ...     use_reentrant=False,
        ...     context_fn=ckpt_kernels.recompute.selective_contexts,
        ... )
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.RMSNorm(64), torch.nn.Linear(64, 8))
        >>> compiled = torch.compile(lambda x: checkpoint(model, x))
    """
    return create_selective_checkpoint_contexts(_keep_all_but_blocks)


def _keep_all_but_blocks(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ours = getattr(op, "namespace", None) == "ckpt_kernels"
    return CheckpointPolicy.PREFER_RECOMPUTE if ours else CheckpointPolicy.MUST_SAVE
