"""Samples of torch's own databases, `op_db` and `module_db`, for the functions and modules here of the same name.

The results of a sample are the output, the arguments and buffers after the call, the gradients, and second gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_leaves, tree_map_only

from ckpt_kernels import functional
from ckpt_kernels import nn as modules

Results = dict[str, Tensor]
# Also on machines with a GPU: torch's CUDA kernels treat strides differently.
DEVICE = "cpu"
# Samples of activations have up to a million elements; samples with more elements than this test nothing new.
MOST = 2048

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "nn.functional.relu": nn.ReLU,
    "nn.functional.leaky_relu": nn.LeakyReLU,
    "nn.functional.elu": nn.ELU,
    "nn.functional.gelu": nn.GELU,
    "nn.functional.silu": nn.SiLU,
    "nn.functional.mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "nn.functional.hardswish": nn.Hardswish,
    "nn.functional.softplus": nn.Softplus,
    "nn.functional.relu6": nn.ReLU6,
    "nn.functional.hardtanh": nn.Hardtanh,
}
_NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")
NAMESAKES = (
    *("LayerNorm", "RMSNorm", "GroupNorm", "GLU"),
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
)


def _activation(module: type[nn.Module]) -> Callable[..., Tensor]:
    return lambda input, **settings: functional.bias_act(input, activation=module(**settings))


def _activation_module(module: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda *args, **settings: modules.BiasAct(1, bias=False, activation=module(*args, **settings))


# The function or module here by torch's name.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{f"nn.functional.{name}": getattr(functional, name) for name in _NORMS},
    "nn.functional.glu": lambda input, dim=-1: modules.GLU(dim)(input),
    **{name: _activation(module) for name, module in _ACTIVATIONS.items()},
}
MODULES: dict[str, Callable[..., nn.Module]] = {
    **{name: getattr(modules, name) for name in NAMESAKES},
    **{module.__name__: _activation_module(module) for module in _ACTIVATIONS.values()},
}
OPS = {op.name: op for op in op_db if op.name in FUNCTIONS and not op.variant_test_name}
MODULE_INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in MODULES}


@dataclass(frozen=True)
class Sample:
    """The arguments of one call; for a module also the arguments of the constructor, the mode and the state."""

    args: tuple
    kwargs: dict[str, Any]
    made_by: tuple[tuple, dict[str, Any]] | None = None
    training: bool = True
    state: dict[str, Tensor] | None = None

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Sample":
        args, kwargs, state = tree_map_only(Tensor, change, (self.args, self.kwargs, self.state))
        return replace(self, args=args, kwargs=kwargs, state=state)

    def in_layout(self, lay: Callable[[Tensor], Tensor]) -> "Sample":
        """The same sample with the arguments in another memory layout."""
        args, kwargs = tree_map_only(Tensor, lay, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def redrawn(self, seed: int) -> "Sample":
        """The same sample with other values of about the same magnitude."""
        generator = torch.Generator().manual_seed(seed)

        def redraw(tensor: Tensor) -> Tensor:
            factors = 1 + torch.rand(tensor.shape, generator=generator).to(tensor.device) / 4
            return _with_values(tensor, (tensor.detach() * factors).to(tensor.dtype))

        return self.with_tensors(redraw)

    @property
    def arguments(self) -> list[Tensor]:
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def run(self, fn: Callable[..., Any], seed: int = 0, twice: bool = True) -> Results:
        """The results of `fn`, a function or a constructor of a module, on a copy of this sample.

        They include second gradients if `twice` is set.
        """
        own = self.with_tensors(lambda t: _with_values(t, t))
        tensors = {f"argument {place}": t for place, t in enumerate(own.arguments)}
        if self.made_by is None:
            return _results(fn(*own.args, **own.kwargs), tensors, seed, twice)
        module = made(fn, self.made_by).train(self.training).to(self.args[0].dtype)
        module.load_state_dict(own.state)
        tensors |= dict(module.named_parameters()) | dict(module.named_buffers())
        return _results(module(*own.args, **own.kwargs), tensors, seed, twice)

    def __str__(self) -> str:
        def short(tensor: Tensor) -> str:
            return f"tensor of {tuple(tensor.shape)} with strides {tensor.stride()}"

        args, kwargs = tree_map_only(Tensor, short, (self.args, self.kwargs))
        module = "" if self.made_by is None else f" of {self.made_by} in {'training' if self.training else 'eval'}"
        return f"{args} {kwargs}{module}"


def made(module: Callable[..., nn.Module], made_by: tuple[tuple, dict[str, Any]]) -> nn.Module:
    args, kwargs = made_by
    return module(*args, **kwargs).to(DEVICE)


def _with_values(tensor: Tensor, values: Tensor) -> Tensor:
    """A new leaf with these values and the tensor's strides."""
    room = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    once = tuple(slice(None) if stride else slice(1) for stride in tensor.stride())
    room[once].copy_(values.detach()[once])
    return room.requires_grad_(tensor.requires_grad)


def in_float64(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _results(output: Tensor, tensors: dict[str, Tensor], seed: int, twice: bool) -> Results:
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        # Values of a few bits are the same numbers in every dtype.
        return torch.empty_like(like).copy_(torch.randint(-8, 9, like.shape, generator=generator) / 8)

    found = {"output": output.detach()}
    found |= {f"{name} afterwards": t.detach() for name, t in tensors.items() if not t.requires_grad}
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    assert output.requires_grad
    grad_output = random(output.detach()).requires_grad_()
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output, create_graph=twice)
    found |= {f"gradient of {name}": g.detach() for name, g in zip(leaves, gradients, strict=True)}
    if not twice:
        return found
    weights = [random(g.detach()) for g in gradients]
    pairs = [(g, w) for g, w in zip(gradients, weights, strict=True) if g.requires_grad]
    leaves["grad_output"] = grad_output
    options = {"allow_unused": True, "materialize_grads": True}
    seconds = torch.autograd.grad([g for g, _ in pairs], list(leaves.values()), [w for _, w in pairs], **options)
    return found | {f"second gradient of {name}": g for name, g in zip(leaves, seconds, strict=True)}


def function_samples(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples of a function, and of its reference, which include non-finite values."""
    for sample in OPS[name].reference_inputs(DEVICE, dtype, requires_grad=True):
        if sample.input.numel() <= MOST:
            yield Sample((sample.input, *sample.args), sample.kwargs)


def module_samples(name: str, dtype: torch.dtype, training: bool) -> Iterator[Sample]:
    info = MODULE_INFOS[name]
    for sample in info.module_inputs_func(info, DEVICE, dtype, True, training):
        made_by = (sample.constructor_input.args, sample.constructor_input.kwargs)
        generator = torch.Generator().manual_seed(1)
        state = {}
        for key, tensor in made(info.module_cls, made_by).to(dtype).state_dict().items():
            # A new module has ones and zeros, which hide errors.
            added = torch.randint(1, 9, tensor.shape, generator=generator).to(tensor) / 8
            state[key] = tensor + added if tensor.is_floating_point() else tensor
        call = sample.forward_input
        yield Sample(call.args, call.kwargs, made_by, training, state)


def _in_format(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats[tensor.dim()]) if tensor.dim() in formats else tensor


# Memory layouts for the tensors of a sample.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "not contiguous": lambda t: noncontiguous_like(t) if t.numel() > 1 else t,
    "channels last": _in_format,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
}


def in_layouts(samples: Sequence[Sample]) -> Iterator[tuple[str, Sample]]:
    """Each sample as given, and in each memory layout that changes its strides."""
    for sample in samples:
        yield "", sample
        seen = {str(sample)}
        for name, lay in LAYOUTS.items():
            other = sample.in_layout(lambda t, lay=lay: lay(t.detach()).requires_grad_(t.requires_grad))
            if str(other) not in seen:
                seen.add(str(other))
                yield name, other
