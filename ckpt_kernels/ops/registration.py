"""Registers an op with torch: its schema, fake function and autograd rule, given once and used on two paths.

Where one of torch's transforms must see the single steps of an op, torch's own operators compute the op instead. They
have every derivative and every batching rule.
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
    """A differentiable op, `torch.ops.ckpt_kernels.<name>`. It is called with its tensors and one value of options.

    A call with plain tensors runs `forward` directly, inside a `torch.autograd.Function` if gradients are enabled: on
    small inputs the dispatcher costs more than eager torch's whole layer. Where something must see the op
    (torch.compile, dispatch modes, tensor subclasses), the call goes through the dispatcher, with the same autograd
    rule. Nested tensors and DTensors are unwrapped before that: see `nested` and `dtensor`. Within transforms (see
    `is_transformed`) the composition runs.

    Results are tuples, in which None stands for a missing tensor. The dispatcher does not support None, and gets an
    empty tensor instead. Subclasses define:

    - `returned`: the number of results of a call; None for the only result itself. Further results are only kept for
      backward.
    - `differentiable_results`: the number of leading results that have gradients.
    - `terms`: the number of leading tensors whose sum is the second result; None if the second result is no sum.
    - `has_recipe`: whether `recipe` says how to recompute an output.
    - `sharding`: how tensors may be split; None for ops that are never called with DTensors or nested tensors.
    - `forward(*tensors, options)`: computes the results, without autograd.
    - `empty(*tensors, options)`: allocates tensors like the results, for torch.compile.
    - `setup_context(ctx, arguments, results)`, `backward(ctx, gradients)`: the autograd rule. `backward` returns the
      gradients of the differentiable tensors, which come first.
    - `composition(*tensors, options)`: the returned results, by differentiable torch ops.
    - `flattened(options)`, `structured(flat)`: the options as the schema has them, and back.
    """

    returned: int | None = None
    differentiable_results: int = 1
    terms: int | None = None
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

        # A function, because compiled autograd does not support bound methods.
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
        """The dispatcher's results, with None for missing tensors."""
        return results

    def without_gradients(self, results: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Tensor]:
        """The results that have no gradients, where `wanted` says which operands have."""
        is_sum_constant = self.terms is not None and not any(wanted[: self.terms])
        first = 1 if is_sum_constant else self.differentiable_results
        return [result for result in results[first:] if result is not None]

    def total(self, arguments: Sequence[Any], results: Sequence[Tensor | None]) -> Any:
        """A result that the op saves itself, with the announcement of how to recompute that; None if there is none."""
        return None

    def _first(self, results: Sequence[Tensor | None]) -> Any:
        return results[0] if self.returned is None else results[: self.returned]

    # The direct path, to which `thin`'s calls fall back. A torch.autograd.Function has a cost for each argument, so all
    # options are one argument.

    def full_forward(self, ctx: Any, *arguments: Any) -> Any:
        """The forward pass within autograd. The last arguments are the options, and whether the output is recorded."""
        *arguments, is_recorded = arguments
        results = self.forward(*arguments)
        ctx.backend = backends.chosen()
        ctx.set_materialize_grads(False)
        self.setup_context(ctx, arguments, results)
        if is_recorded:
            recompute.announce(self.recipe(ctx, arguments, results), self.elementwise, self.total(arguments, results))
        if self.returned is None:
            return results[0]
        ctx.mark_non_differentiable(*self.without_gradients(results[: self.returned], ctx.needs_input_grad))
        return results[: self.returned]

    def full_backward(self, ctx: Any, *gradients: Tensor | None) -> tuple:
        """A gradient for each argument of `full_forward`."""
        if torch.compiler.is_compiling() or backends.chosen() == ctx.backend:
            grads = self.backward(ctx, gradients[: self.differentiable_results])
        else:
            with backends.serving(ctx.backend):
                grads = self.backward(ctx, gradients[: self.differentiable_results])
        return *grads, *(None,) * (self._tensors + 2 - len(grads))

    # The dispatcher's path: arguments are flat, all results are returned, and all are tensors.

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
        ctx.mark_non_differentiable(*self.without_gradients(results, ctx.needs_input_grad))
        self.setup_context(ctx, self._arguments(inputs), results)
        ctx.count = len(inputs)

    def _dispatched_backward(self, ctx: Any, *gradients: Tensor | None) -> tuple:
        grads = self.backward(ctx, gradients[: self.differentiable_results])
        return *grads, *(None,) * (ctx.count - len(grads))

    def _with_autograd(self, keyset: torch._C.DispatchKeySet, *flat: Any) -> Any:
        """Like the kernel of `torch.library.register_autograd`, which loses tangents, and which torch.func refuses."""
        return self._composed(*flat) if is_transformed() else self._differentiated(keyset, *flat)


def joined(*arguments: str) -> str:
    """A schema joined from parts, of which some may be empty."""
    return ", ".join(filter(None, arguments))


def autograd_apply(name: str, forward: Callable[..., Any], backward: Callable[..., tuple]) -> Callable[..., Any]:
    """`apply` of an autograd.Function, without the check for torch.func's transforms, which the caller has done."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return super(torch.autograd.Function, type(name, (torch.autograd.Function,), methods)).apply


def is_transformed() -> bool:
    """Whether every operation must be one of torch's own.

    That is so within torch.func's transforms (vmap, grad, jvp and so on), in forward-mode AD, and while torch.jit.trace
    records.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_plain(arguments: Sequence[Any]) -> bool:
    """Whether only autograd must see the op: no tensor subclass, and no mode.

    A batch of gradients from `is_grads_batched`, which the dispatcher passes on one by one, is not plain. It comes as
    the first argument.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.is_legacy_batchedtensor(arguments[0]):
        return False
    for argument in arguments:
        if type(argument) not in _PLAIN:
            return False
    return True
