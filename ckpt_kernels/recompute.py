"""Letting go of blocks' outputs: what reads one keeps a recipe for it, and gets it back in the backward pass.

A block keeps its input and computes the rest again in its backward kernel. Its output would still be kept, by whatever
reads it for a gradient of its own: a Linear, a convolution, attention, any autograd.Function. Within `discard_outputs`
that reader's graph keeps a `Recipe` in the place of the output: the tensors that the block keeps anyway, and its
forward kernel to run on them again, which costs memory traffic and no matrix product. Gradients are the same to the
last bit, because the kernel and what it reads are the same. The same goes for what torch's own cheap ops make, where
the graph says how (see `provenance`).

It works by torch's saved-tensor hooks, on the thread and for the time of the context. Only the innermost pair of hooks
runs in torch; hooks that were there before are called from here for all that is not discarded.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from . import provenance
from .discarder import Announcement, Discarder, Total, sees_what_is_saved, thread
from .recipes import Cell


class discard_outputs(contextlib.ContextDecorator):
    """While active, what reads a block's output for its own gradient keeps a recipe for it in its place.

    Also a decorator: `@discard_outputs()` over a function or a `forward`. It holds for the calling thread, and within
    another the outer one goes on, with its options. An output is let go of unless as much would be kept to make it
    again: that of `bias_act` with the identity, relu or leaky_relu stays, and that of `rotary` without a norm where
    nobody else keeps what it turns. Views of an output count as the output, and so do the copies that autocast makes of
    it. Where an output has been written to in place, what read it before gets what it read, and what reads it
    afterwards keeps it, or a recipe with these writes in it if the graph knows them all.

    What torch's own cheap ops make is let go of likewise, such as the product in `linear(silu(gate) * value)`: if the
    autograd graph says how it was made, from tensors that the graph keeps anyway, and if these and it have not been
    written to where autograd does not see it. Writes through `.data` and by others' kernels are seen by nobody, and
    those to a bias, of which a copy is made for what it was added to, only if the module is given that it belongs to.

    What is kept is kept as it was: a parameter that is given other data by the time of the backward pass (`p.data =
    other`) has the gradient of what ran, and a function of one's own that saves a parameter gets its values back, not
    the object with its attributes. The first is so of torch's matrix products, the second of all saved-tensor hooks.

    Where saved-tensor hooks are disabled (torch.func) it does nothing, nor where torch.jit.trace records, and within
    torch.compile it does nothing either: see `selective_contexts` for that.

    Args:
        module: the one whose forward pass runs within.
        products: matrix products too, where it is `bias_act`, `dyt`, `glu` or `packed_glu` that reads them. They run
            again in the backward pass. Of biases copies are kept.
        temporaries: also what is made of a tensor that nothing keeps, such as the sum in `relu(norm(x) + y)`. That is
            right if no such tensor is written to where autograd does not see it, under `no_grad` or by way of
            `detach()`: it cannot be told from the graph.

    Kept for backward:
        In the place of an output a recipe, which holds the tensors that the block keeps anyway.

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
        self._entered: list[AbstractContextManager[None] | None] = []

    def _recreate_cm(self) -> "discard_outputs":
        return discard_outputs(self._module, products=self._products, temporaries=self._temporaries)

    def __enter__(self) -> "discard_outputs":
        hooks: Any = torch._C._autograd  # of which not all is in torch's stubs
        # A trace would record what the hooks do.
        is_recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if is_recorded or not hooks._saved_tensors_hooks_is_enabled():
            self._entered.append(None)
            return self
        # Within another that sees what is saved, that one goes on: outputs may cross from one to the other.
        hooked = None if discarding() is not None else _hooked(self._products, self._temporaries)
        self._entered.append(hooked)
        if hooked is not None:
            hooked.__enter__()
            if self._module is not None:
                thread.active[-1].begin(self._module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooked = self._entered.pop()
        if hooked is not None:
            hooked.__exit__(kind, error, trace)


@contextlib.contextmanager
def _hooked(products: bool, temporaries: bool) -> Iterator[None]:
    """A discarder at work.

    The end is a mark on the discarder itself, so that it holds wherever this generator is closed: by an interrupt
    between any two steps, when the last reference to it goes; in another thread, whose own hooks are not touched.
    """
    discarder = Discarder(products, temporaries)
    hooks = torch.autograd.graph.saved_tensors_hooks(discarder.pack, _unpack)
    try:
        hooks.__enter__()
        thread.active.append(discarder)
        yield
    finally:
        discarder.is_closed = True
        discarder.close()
        if sees_what_is_saved(discarder):
            hooks.__exit__(None, None, None)


class layer:
    """A function, or a module, of which the backward pass runs all products again but the last: a layer of a network.
    What it makes is called as the function is; it is no module.

    What goes into it is kept, and what its attention saves of its own result. Queries, keys and values, the product of
    attention's output, what the MLP begins with, norms, gates and rotations are made again, once, when the
    backward pass comes to the layer. Neither attention runs again nor the last product: a checkpoint of the layer runs
    both for nothing.

    A product runs again if torch's graph says how (`nn.Linear`, `F.linear`, two-dimensional `@`, grouped ones), and the
    last one too where a norm reads it. Kept are products of three dimensions, as of an attention that is written out,
    outputs of convolutions, and plain sums of products that a norm reads: those of `add_rms_norm` and `add_layer_norm`
    are made again. Around a function that is no module
    it is not seen whether a bias is written to in the forward pass. Under no_grad and torch.compile it does nothing.

    Args:
        function: anything that is called with tensors, and returns tensors, by themselves or in a tuple, list or dict.

    Kept for backward:
        Tensors that are given to it and that come out of it, if somebody's gradient needs them, and what no recipe can
        make again; copies of biases.

    Raises:
        RuntimeError: in the backward pass, where a tensor that is to be read again has been written to in place since.

    Example:
        >>> block = torch.nn.Sequential(ckpt_kernels.nn.LayerNorm(64), ckpt_kernels.nn.MLP(64, 256))
        >>> x = torch.randn(32, 64, requires_grad=True)
        >>> layer = ckpt_kernels.recompute.layer(block)
        >>> saved_bytes(layer, x, parameters_of=block) < saved_bytes(block, x) / 3
        True
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._function if isinstance(self._function, nn.Module) else None
        return run_as_layer(self._function, module, args, kwargs)


def run_as_layer(function: Callable[..., Any], module: nn.Module | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """See `layer`; the module is that whose forward runs."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    with discard_outputs(module, products=True):
        discarder = None if torch.compiler.is_compiling() else discarding()
        if discarder is None:
            return function(*args, **kwargs)
        return _between_edges("layer", discarder, function, args, kwargs)


def run_at(
    level: str,
    function: Callable[..., Any],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    alone: bool = False,
) -> Any:
    """A module's forward at a level of its own, whatever that of the contexts around it.

    Args:
        level: "block", "output", "all" or "layer", as of `convert`.
        function: the forward.
        module: that it is the forward of.
        args, kwargs: of the call.
        alone: whether the module is to keep the same, tensor by tensor, when it is called again by itself: then nothing
            that was made before it is looked at.
    """
    with discard_outputs(module):
        discarder = None if torch.compiler.is_compiling() else discarding()
        if discarder is None:
            return function(*args, **kwargs)
        return _between_edges(level, discarder, function, args, kwargs, alone or level == "layer")


def _between_edges(
    level: str,
    discarder: Discarder,
    function: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    holds: bool = True,
) -> Any:
    for tensor in provenance.tensors_among((args, kwargs)) if holds else ():
        discarder.hold(tensor)
    with discarder.at(level):
        output = function(*args, **kwargs)
    for tensor in provenance.tensors_among(output) if holds else ():
        discarder.hold(tensor)
    return output


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
        with discard_outputs(self.module):
            return self.module(*args, **kwargs)


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch.compile, which does not use hooks: tells its partitioner to compute blocks again and keep the rest.

    The compiled model keeps what it would keep within `discard_outputs`. By itself the partitioner takes a block for an
    op that is too dear to run again, and keeps its input and its output.

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


def discarding() -> Discarder | None:
    """The context that sees what is saved now: the innermost, unless somebody else's hooks are within it."""
    innermost = _innermost()
    return innermost if innermost is not None and sees_what_is_saved(innermost) else None


def announce(
    announcement: Announcement | None, elementwise: bool = False, total: tuple[Tensor, Announcement] | None = None
) -> None:
    """From within an op's forward: how its output can be had again, from what it keeps anyway; None if it cannot.

    What an `elementwise` op saves may be a product that runs again, where that was asked for. `total` is another
    result, which the op saves, and how that can be had.
    """
    discarder = _innermost()
    if discarder is None:
        return
    seen = sees_what_is_saved(discarder) and not discarder.is_paused
    discarder.announced = announcement if seen else None
    discarder.saved = [] if seen else None
    discarder.is_elementwise = elementwise and seen
    discarder.total = Total(total[0].untyped_storage()._cdata, total[1]) if seen and total is not None else None


def announce_in_layer(announcement: Announcement) -> bool:
    """The same of a product, which runs again within a layer alone, before its op; whether it is to be recorded."""
    discarder = discarding()
    if discarder is None or not discarder.layers:
        return False
    announce(announcement)
    return True


def record(output: Tensor, recipe: Announcement | None = None) -> None:
    """From now on what reads `output` for a gradient, and is discarding, keeps a recipe in the place of it.

    After an op's forward: the recipe is the one that was announced. Of another output it is given, and is kept as long
    as the output is.
    """
    discarder = _innermost() if recipe is None else discarding()
    if discarder is not None and (recipe is None or output.requires_grad):
        discarder.record(output, recipe)


def note(output: Any, *operands: Any) -> None:
    """After an operation of torch's, a sum, say: where nobody has written to its operands, so that what it made may be
    made again from what they were made of; and which number stood for one."""
    if torch.compiler.is_compiling() or not thread.active or type(output) is not Tensor:
        return
    if output.grad_fn is None or output._version or discarding() is None:
        return
    tensors = [o for o in operands if isinstance(o, Tensor)]
    numbers = [o for o in operands if type(o) in (int, float)]
    if len(tensors) + len(numbers) != len(operands) or not all(map(provenance.is_as_made, tensors)):
        return
    provenance.note(output.grad_fn, (*(None for _ in tensors), *numbers))


def is_active() -> bool:
    """Whether a context is active on this thread."""
    return _innermost() is not None


def _innermost() -> Discarder | None:
    active = thread.active
    while active and active[-1].is_closed:
        active.pop()
    return active[-1] if active else None


def _unpack(packed: Cell) -> Tensor:
    # Compiled autograd traces through hooks. Versions, locks and what is shared by readers are for no tracer.
    return _unpack_untraced(packed) if torch.compiler.is_compiling() else packed.content.get()


@torch._disable_dynamo
def _unpack_untraced(packed: Cell) -> Tensor:
    return packed.get()
