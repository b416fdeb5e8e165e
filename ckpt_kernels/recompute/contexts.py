"""The contexts in which outputs are let go of: saved-tensor hooks, on the thread and for the time of the context."""

import contextlib
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .. import backends
from . import fast_path, provenance
from .active import discarding, innermost, sees_what_is_saved, thread
from .cells import Cell, Kept, nothing
from .discarder import Discarder
from .entries import Block, Entry
from .recipes import LONGEST_CHAIN, Claim, Recipe
from .rules import ATTENTIONS, PASSING
from .transforms import allow_transforms

_is_traced = torch.compiler.is_dynamo_compiling


class discard_outputs(contextlib.ContextDecorator):
    """While active, a reader that saves a block's output for a gradient keeps a recipe for that output instead.

    Also a decorator: `@discard_outputs()` over a function or a `forward`. A context holds for the calling thread;
    within another the outer one goes on, with the outer options. An output stays where a recipe would keep as much:
    that of `bias_act` with the identity, relu or leaky_relu, and that of `rotary` without a norm where nobody else
    keeps the input. Views of an output count as the output, and so do the copies that autocast makes. After a write in
    place to an output, earlier readers get the old values back, and later readers keep the tensor, or a recipe with
    these writes if the graph knows them all.

    Outputs of torch's own cheap ops are let go of likewise, such as the product in `linear(silu(gate) * value)`: if the
    autograd graph tells how the output was made, from tensors that the graph keeps anyway, and if nobody has written to
    any of them where autograd does not see the write. Writes through `.data` and by others' kernels are seen by nobody.
    Of a bias the recipe keeps a copy; writes to the bias are seen only if `module` is given.

    Kept tensors keep their values: a parameter that is given other data before the backward pass (`p.data = other`) has
    the gradient of the values that ran, and a function of one's own that saves a parameter gets the values back, not
    the object with its attributes. The first is so of torch's matrix products, the second of all saved-tensor hooks.

    torch.func's gradients may begin within the context; what runs in them keeps what torch keeps. Where saved-tensor
    hooks are disabled (around the context), where torch.jit.trace records, and within torch.compile, the
    context does nothing; for torch.compile see `selective_contexts`.

    Args:
        module: the one whose forward pass runs within.
        products: let go of matrix products too, where `bias_act`, `dyt`, `glu` or `packed_glu` reads them. They run
            again in the backward pass. Of biases copies are kept.
        temporaries: let go of results of tensors that nothing keeps too, such as the sum in `relu(norm(x) + y)`. That
            is right if nobody writes to such a tensor where autograd does not see the write, under `no_grad` or by way
            of `detach()`: the graph cannot tell.

    Kept for backward:
        A recipe instead of an output, which holds the tensors that the block keeps anyway.

    Raises:
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
        The grain: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; the way:
        `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self, module: nn.Module | None = None, *, products: bool = False, temporaries: bool = False) -> None:
        self._module = module
        self._products = products
        self._temporaries = temporaries
        self._entered: list[Generator[None, None, None] | None] = []

    def _recreate_cm(self) -> "discard_outputs":
        return discard_outputs(self._module, products=self._products, temporaries=self._temporaries)

    def __enter__(self) -> "discard_outputs":
        hooks: Any = torch._C._autograd  # of which not all is in torch's stubs
        # A trace would record what the hooks do.
        is_recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if is_recorded or not hooks._saved_tensors_hooks_is_enabled():
            self._entered.append(None)
            return self
        # Within another active context that one goes on: outputs may cross from one to the other.
        hooked = None if discarding() is not None else _hooked(self._module, self._products, self._temporaries)
        self._entered.append(hooked)
        if hooked is not None:
            next(hooked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooked = self._entered.pop()
        if hooked is not None:
            hooked.close()


def _hooked(module: nn.Module | None, products: bool, temporaries: bool) -> Generator[None, None, None]:
    """A discarder at work, from the first step to the end.

    The end is a mark on the discarder itself, so that it holds wherever this generator is closed: by an interrupt
    between any two steps, when the last reference to it goes; in another thread, whose own hooks are not touched.
    """
    allow_transforms()
    discarder = Discarder(module, products, temporaries)
    hooks: Any = torch._C._autograd  # of which not all is in torch's stubs
    try:
        hooks._push_saved_tensors_default_hooks(fast_path.packing(discarder), _unpack)
        thread.active.append(discarder)
        yield
    finally:
        discarder.is_closed = True
        innermost()
        discarder.close()
        if sees_what_is_saved(discarder):
            hooks._pop_saved_tensors_default_hooks()


def use_library(thin: Any) -> None:
    """From now on `_thin`, which is given, packs and records in the usual cases."""
    stops = ATTENTIONS | {provenance.LEAF}
    thin.set_up_cells(Cell, Kept, Claim, torch.strided, LONGEST_CHAIN, PASSING, stops, BackwardCFunction)
    thin.set_up_records(Recipe, Entry, Block, StorageWeakRef, backends.chosen, threading.RLock, nothing)
    fast_path.library = thin


def _unpack(packed: Cell) -> Tensor:
    # Compiled autograd traces through hooks. Versions, locks and shared results are for no tracer.
    if _is_traced():
        return _unpack_untraced(packed)
    # `nodes.results_of_function` asks whose outputs these are: values would be made for nothing.
    return nothing(torch.float32) if thread.wants_identities else packed.content.get()


@torch._disable_dynamo
def _unpack_untraced(packed: Cell) -> Tensor:
    return packed.get()


class DiscardOutputs(nn.Module):
    """`module`, whose forward pass runs within `discard_outputs`.

    Args:
        module: any module.

    Example:
        >>> model = torch.nn.Sequential(ckpt_kernels.nn.RMSNorm(64), torch.nn.Linear(64, 8))
        >>> model = ckpt_kernels.recompute.DiscardOutputs(model)
        >>> model(torch.randn(8, 64)).shape
        torch.Size([8, 8])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        with discard_outputs(module):
            return module(*args, **kwargs)


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch.compile, which does not use hooks: tells the partitioner to compute blocks again and keep the rest.

    The compiled model keeps the same tensors as an eager one within `discard_outputs`. By default the partitioner takes
    a block for an op that is too dear to run again, and keeps input and output.

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
