"""How torch knows an op: its schema, its fake function and its autograd rule, given once, used two ways.

Where a transform of torch's must see through an op, torch's own operators compute it instead: these have every
derivative and every batching rule that there is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from .. import backends, recompute
from . import nested
from .same_backend import same_backend
from .sharding import Sharding, is_sharded

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_library = torch.library.Library("ckpt_kernels", "DEF")


class Registered:
    """A differentiable op, `torch.ops.ckpt_kernels.<name>`. It is called with its tensors and its options, one value.

    Calling it with plain tensors goes straight to `forward`, inside a `torch.autograd.Function` where gradients are on:
    on small inputs the dispatcher's path costs more than eager torch's whole layer. Whatever must see the op
    (torch.compile, dispatch modes, tensor subclasses) gets it from the dispatcher, under the same autograd rule. Nested
    tensors and DTensors are taken apart before that: see `nested` and `dtensor`. Within transforms (see
    `is_transformed`) it is the composition that runs.

    Results are tuples, in which None stands for a tensor that there is not; the dispatcher, which knows no such thing,
    is handed an empty one. Subclasses have:

    - `returned`: how many results a call returns, None for the only one itself; others are kept for backward.
    - `differentiable_results`: how many of the first have gradients.
    - `has_recipe`: whether `recipe` says how an output can be had again.
    - `sharding`: how tensors may be split; None for what is never called with DTensors or nested tensors.
    - `forward(*tensors, options)`: computes the results of real tensors, without autograd.
    - `empty(*tensors, options)`: makes tensors like the results, for torch.compile.
    - `setup_context(ctx, arguments, results)`, `backward(ctx, gradients)`: the autograd rule; gradients of the first
      tensors, without those that never have any.
    - `composition(*tensors, options)`: the results that a call returns, by differentiable operators of torch's.
    - `flattened(options)`, `structured(flat)`: options as the schema has them, and back.
    """

    returned: int | None = None
    differentiable_results: int = 1
    has_recipe = False
    elementwise = False
    sharding: Sharding | None = None

    def __init__(self, name: str, tensors: str, options: str, results: Sequence[str]) -> None:
        self._tensors = tensors.count(",") + 1
        self._results = len(results)
        outcome = ", ".join(f"Tensor {name}" for name in results)
        outcome = f"({outcome})" if len(results) > 1 else "Tensor"
        _library.define(f"{name}({joined(tensors, options)}) -> {outcome}")
        _library.impl(name, self._implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ckpt_kernels::{name}", self._fake, lib=_library)
        _library.impl(name, self._composed, "FuncTorchBatched")
        self._dispatched = getattr(torch.ops.ckpt_kernels, name).default
        setup_context, backward = same_backend(self._dispatched_setup, self._dispatched_backward)
        self._differentiated = make_autograd_impl(self._dispatched, Info(backward, setup_context))
        _library.impl(name, self._with_autograd, "Autograd", with_keyset=True)
        self.name = name

        # A function, and no bound method, which compiled autograd does not take.
        def full_backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            return self.full_backward(ctx, *gradients)

        self._apply = autograd_apply(name, self.full_forward, full_backward)

    def __call__(self, *arguments: Any) -> Any:
        if is_transformed():
            return self._first(self.composition(*arguments))
        tensors = arguments[:-1]
        if torch.compiler.is_compiling() or not is_plain(tensors):
            if self.sharding is not None:
                if arguments[0].is_nested:
                    return nested.call(self, arguments)
                if is_sharded(tensors):
                    from . import dtensor

                    return dtensor.call(self, self.sharding, arguments)
            results = self._dispatched(*tensors, *self.flattened(arguments[-1]))
            return self._first(self.present(arguments, results if self._results > 1 else (results,)))
        if not torch.is_grad_enabled():
            results = self.forward(*arguments)
            return results[0] if self.returned is None else results[: self.returned]
        is_recorded = self.has_recipe and recompute.is_active()
        output = self._apply(*arguments, is_recorded)
        if is_recorded:
            recompute.record(output if isinstance(output, Tensor) else output[0])
        return output

    def present(self, arguments: Sequence[Any], results: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The dispatcher's results, with None again for one that there is not."""
        return results

    def total(self, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> Any:
        """A result that the op itself saves, and how it can be had again from others' tensors; None for none."""
        return None

    def _first(self, results: Sequence[Tensor | None]) -> Any:
        return results[0] if self.returned is None else results[: self.returned]

    # The direct path, to which `thin`'s calls come back. A torch.autograd.Function pays for each argument: so all that
    # are not tensors are one.

    def full_forward(self, ctx: Any, *arguments: Any) -> Any:
        """In the graph: of the tensors, the options and whether the output is recorded."""
        *arguments, is_recorded = arguments
        results = self.forward(*arguments)
        ctx.backend = backends.chosen()
        ctx.set_materialize_grads(False)
        self.setup_context(ctx, arguments, results)
        if is_recorded:
            recompute.announce(self.recipe(ctx, arguments, results), self.elementwise, self.total(arguments, results))
        if self.returned is None:
            return results[0]
        ctx.mark_non_differentiable(*results[self.differentiable_results : self.returned])
        return results[: self.returned]

    def full_backward(self, ctx: Any, *gradients: Tensor | None) -> tuple:
        """A gradient for each argument of `full_forward`."""
        if torch.compiler.is_compiling() or backends.chosen() == ctx.backend:
            found = self.backward(ctx, gradients[: self.differentiable_results])
        else:
            with backends.serving(ctx.backend):
                found = self.backward(ctx, gradients[: self.differentiable_results])
        return *found, *(None,) * (self._tensors + 2 - len(found))

    # The dispatcher's path: arguments are flat, all results are to be returned, and all are tensors.

    def _arguments(self, flat: Sequence[Any]) -> tuple:
        return *flat[: self._tensors], self.structured(flat[self._tensors :])

    def _implementation(self, *flat: Any) -> Any:
        return self._dense(self.forward(*self._arguments(flat)), flat[0])

    def _fake(self, *flat: Any) -> Any:
        return self._dense(self.empty(*self._arguments(flat)), flat[0])

    def _composed(self, *flat: Any) -> Any:
        return self._dense(self.composition(*self._arguments(flat)), flat[0])

    def _dense(self, results: Sequence[Tensor | None], like: Tensor) -> Any:
        results = (*results, *(None,) * (self._results - len(results)))
        dense = tuple([like.new_empty(0) if t is None else t for t in results])
        return dense if self._results > 1 else dense[0]

    def _dispatched_setup(self, ctx: Any, inputs: tuple, output: Any) -> None:
        results = output if self._results > 1 else (output,)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[self.differentiable_results :])
        self.setup_context(ctx, self._arguments(inputs), results)
        ctx.count = len(inputs)

    def _dispatched_backward(self, ctx: Any, *gradients: Tensor | None) -> tuple:
        found = self.backward(ctx, gradients[: self.differentiable_results])
        return *found, *(None,) * (ctx.count - len(found))

    def _with_autograd(self, keyset: torch._C.DispatchKeySet, *flat: Any) -> Any:
        """What `torch.library.register_autograd` makes does: but that loses tangents, and torch.func refuses it."""
        return self._composed(*flat) if is_transformed() else self._differentiated(keyset, *flat)


def joined(*arguments: str) -> str:
    """Parts of a schema, of which some may be empty."""
    return ", ".join(filter(None, arguments))


def autograd_apply(name: str, forward: Callable[..., Any], backward: Callable[..., tuple]) -> Callable[..., Any]:
    """`apply` of an autograd.Function of these, past its own look for torch.func's transforms, which whoever calls it
    has done."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return super(torch.autograd.Function, type(name, (torch.autograd.Function,), methods)).apply


def is_transformed() -> bool:
    """Whether every operation is one of torch's own to be: within torch.func's transforms (vmap, grad, jvp and so on),
    where tangents are carried forward, and where torch.jit.trace records."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_plain(arguments: Sequence[Any]) -> bool:
    """Whether nothing but autograd needs to see the op: no subclass among the tensors, and no mode.

    Nor a batch of gradients, of `is_grads_batched`, which the dispatcher hands to the op one by one. It comes by the
    first argument.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.is_legacy_batchedtensor(arguments[0]):
        return False
    for argument in arguments:
        if type(argument) not in _PLAIN:
            return False
    return True
