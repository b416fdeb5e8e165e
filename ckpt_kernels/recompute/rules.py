"""How the results of torch's own cheap ops are recomputed, by the names of their autograd nodes.

Results of ops that are not in these tables are not recomputed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rule(NamedTuple):
    """How the output of a node is recomputed: `function(*operands, *extras, *options(node))`.

    - `saved` has a name for each edge of the node: that of the saved tensor that is the operand, None for an operand
      that the node does not save. Without `saved`, `function` takes the operands of all edges as one sequence.
    - `options` reads the op's other arguments from the node.
    - `private` says that torch made the first operand itself and gave it to nobody else.
    - `autocast_operand` is the place of a bias. If autocast cast the bias, the recipe reads a copy (`Biases.cast`).
    - `extras` names saved tensors, one or several, that have no gradient and no edge.
    - `has_several_outputs` says that `function` returns a sequence, with an item for each output of the node.
    - `omitted` counts the last operands that the node lacks.
    - `is_gather` says that the op gathers rows of a parameter and saves nothing of it. It runs again on the parameter
      itself (see `stacked_weights`).
    - `of_experts` says that the op runs again only if its second operand is a stacked weight, or a part of one.
    """

    function: Callable[..., Any]
    saved: tuple[str | None, ...] | None
    options: Callable[[Any], tuple] = lambda node: ()
    private: bool = False
    autocast_operand: int | None = None
    extras: str | None = None
    has_several_outputs: bool = False
    omitted: Callable[[Any], int] = lambda node: 0
    is_gather: bool = False
    of_experts: bool = False


def _attributes(*names: str) -> Callable[[Any], tuple]:
    """Reads saved attributes of a node."""
    return lambda node: tuple(getattr(node, f"_saved_{name}") for name in names)


def _signed(value: Any) -> Any:
    """A dimension with its sign. torch returns dimensions as unsigned numbers."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(map(_signed, value))
    return value - 2**64 if value >= 2**63 else value


def _dims(*names: str) -> Callable[[Any], tuple]:
    """Reads saved dimensions of a node."""
    return lambda node: tuple(_signed(getattr(node, f"_saved_{name}")) for name in names)


def _shape(node: Any) -> tuple:
    return (tuple(node._input_metadata[0].shape),)


def _kind(node: Any) -> tuple:
    output = node._input_metadata[0]
    return output.device, output.dtype


def _dtype(node: Any) -> tuple:
    return (node._input_metadata[0].dtype,)


def _attributes_and_dtype(*names: str) -> Callable[[Any], tuple]:
    """Reads saved attributes of a node, and the dtype of the output."""
    attributes = _attributes(*names)
    return lambda node: (*attributes(node), *_dtype(node))


def _in_dtype(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of operands of several dtypes, with the dtype of the result as the last argument.

    An op that writes over its first operand keeps that operand's dtype, where the function returns the widest one.
    """

    def computed(*arguments: Any) -> Tensor:
        *given, dtype = arguments
        return function(*given).to(dtype)

    return computed


def _cast(operand: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return operand.to(device, dtype, copy=True)


def _gelu(operand: Tensor, approximate: str) -> Tensor:
    return F.gelu(operand, approximate=approximate)


def _add(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    return torch.add(first, second, alpha=alpha)


def _sub(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    return torch.sub(first, second, alpha=alpha)


def _addcmul(first: Tensor, second: Tensor, third: Tensor, value: float) -> Tensor:
    return torch.addcmul(first, second, third, value=value)


def _addmm(bias: Tensor, first: Tensor, second: Tensor, beta: float, alpha: float) -> Tensor:
    return torch.addmm(bias, first, second, beta=beta, alpha=alpha)


def _index(operand: Tensor, *indices: Tensor | None) -> Tensor:
    return torch.ops.aten.index.Tensor(operand, list(indices))


def _index_select(operand: Tensor, index: Tensor, dim: int) -> Tensor:
    return torch.index_select(operand, dim, index)


def _grouped_mm(first: Tensor, second: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return torch._grouped_mm(first, second, offs=offsets, out_dtype=None if dtype is first.dtype else dtype)


def _convolution(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """A convolution with or without a bias."""
    *bias, options = rest
    return torch.convolution(input, weight, *(bias or [None]), *options)


def _of_convolution(node: Any) -> tuple:
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    return (tuple(getattr(node, f"_saved_{name}") for name in names),)


def _has_no_bias(node: Any) -> bool:
    return node._saved_bias_sym_sizes_opt in (None, (0,))


def _contiguous(operand: Tensor) -> Tensor:
    return operand.clone(memory_format=torch.contiguous_format)


# Ops that save their input.
_BY_INPUT = {
    "AbsBackward0": Rule(torch.abs, ("self",)),
    "AvgPool2DBackward0": Rule(
        torch.ops.aten.avg_pool2d,
        ("self",),
        _attributes("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    "CeluBackward0": Rule(torch.celu, ("self",), _attributes("alpha")),
    "ClampBackward1": Rule(torch.clamp, ("self",), _attributes("min", "max")),
    "CosBackward0": Rule(torch.cos, ("self",)),
    "DivBackward0": Rule(_in_dtype(torch.div), ("self", "other"), _dtype),
    "EluBackward0": Rule(torch.ops.aten.elu, ("self",), _attributes("alpha", "scale", "input_scale")),
    "ErfBackward0": Rule(torch.erf, ("self",)),
    "GeluBackward0": Rule(_gelu, ("self",), _attributes("approximate")),
    "GluBackward0": Rule(F.glu, ("self",), _dims("dim")),
    "HardsigmoidBackward0": Rule(F.hardsigmoid, ("self",)),
    "HardswishBackward0": Rule(F.hardswish, ("self",)),
    "HardtanhBackward0": Rule(torch.ops.aten.hardtanh, ("self",), _attributes("min_val", "max_val")),
    "LeakyReluBackward0": Rule(F.leaky_relu, ("self",), _attributes("negative_slope")),
    "LogBackward0": Rule(torch.log, ("self",)),
    "LogSigmoidBackward0": Rule(F.logsigmoid, ("self",)),
    "MaxPool2DWithIndicesBackward0": Rule(
        torch.ops.aten.max_pool2d_with_indices,
        ("self",),
        _attributes("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
        has_several_outputs=True,
    ),
    "MishBackward0": Rule(F.mish, ("self",)),
    "MulBackward0": Rule(_in_dtype(torch.mul), ("self", "other"), _dtype),
    "PowBackward0": Rule(torch.pow, ("self",), _attributes("exponent")),
    "PreluKernelBackward0": Rule(torch.ops.aten._prelu_kernel, ("self", "weight")),
    **{
        f"{name.title()}Pad{n}DBackward0": Rule(getattr(torch.ops.aten, f"{name}_pad{n}d"), ("self",), _dims("padding"))
        for name in ("reflection", "replication")
        for n in (1, 2, 3)
    },
    "SiluBackward0": Rule(F.silu, ("self",)),
    "SinBackward0": Rule(torch.sin, ("self",)),
    "SoftplusBackward0": Rule(F.softplus, ("self",), _attributes("beta", "threshold")),
}
# Ops that save their result; elu, celu and leaky relu do so if they write over their input.
BY_RESULT = {
    "CeluBackward1": Rule(torch.celu, (None,), _attributes("alpha")),
    "EluBackward1": Rule(torch.ops.aten.elu, (None,), _attributes("alpha", "scale", "input_scale")),
    "ExpBackward0": Rule(torch.exp, (None,)),
    "LeakyReluBackward1": Rule(F.leaky_relu, (None,), _attributes("negative_slope")),
    "ReciprocalBackward0": Rule(torch.reciprocal, (None,)),
    "ReluBackward0": Rule(torch.relu, (None,)),
    "RsqrtBackward0": Rule(torch.rsqrt, (None,)),
    "SigmoidBackward0": Rule(torch.sigmoid, (None,)),
    "SqrtBackward0": Rule(torch.sqrt, (None,)),
    "TanhBackward0": Rule(torch.tanh, (None,)),
}
# Ops that save their result and much else, and that do not run again.
ATTENTIONS = frozenset(
    f"ScaledDotProduct{kind}Attention{where}Backward0"
    for kind, where in (("Flash", ""), ("Flash", "ForCpu"), ("Efficient", ""), ("Cudnn", ""))
)
# Ops that save their result, and that do not run again: the result may be rounded otherwise for operands in another
# memory layout.
KEEPING_RESULT = frozenset(("SoftmaxBackward0",))
# Ops that save none of their operands, or not all of them.
_BY_NEITHER = {
    "AddBackward0": Rule(_in_dtype(_add), (None, None), _attributes_and_dtype("alpha")),
    "AddcmulBackward0": Rule(_in_dtype(_addcmul), (None, "tensor1", "tensor2"), _attributes_and_dtype("value")),
    "CatBackward0": Rule(torch.cat, None, _dims("dim")),
    "CloneBackward0": Rule(_contiguous, (None,)),
    "IndexBackward0": Rule(_index, (None,), extras="indices", is_gather=True),
    "IndexSelectBackward0": Rule(_index_select, (None,), _dims("dim"), extras="index", is_gather=True),
    "NegBackward0": Rule(torch.neg, (None,)),
    "SubBackward0": Rule(_in_dtype(_sub), (None, None), _attributes_and_dtype("alpha")),
    "ToCopyBackward0": Rule(_cast, (None,), _kind),
    "UpsampleBilinear2DBackward0": Rule(
        torch.ops.aten.upsample_bilinear2d,
        (None,),
        _attributes("output_size", "align_corners", "scales_h", "scales_w"),
    ),
    "UpsampleNearest2DBackward0": Rule(
        torch.ops.aten.upsample_nearest2d, (None,), _attributes("output_size", "scales_h", "scales_w")
    ),
}
# Nodes of ops whose output may have been written over the operand. Some of these ops have no such form.
WRITERS = frozenset({*_BY_INPUT, *BY_RESULT, "AddBackward0", "AddcmulBackward0", "NegBackward0", "SubBackward0"})
# Ops that return a view of their input, which shares the version counter of the input.
_RESHAPED = Rule(torch.reshape, (None,), _shape)
VIEWS = {
    "AliasBackward0": _RESHAPED,
    "ReshapeAliasBackward0": _RESHAPED,
    "SqueezeBackward0": _RESHAPED,
    "SqueezeBackward1": _RESHAPED,
    "SqueezeBackward2": _RESHAPED,
    "UnsqueezeBackward0": _RESHAPED,
    "ViewBackward0": _RESHAPED,
    "ExpandBackward0": Rule(Tensor.expand, (None,), _shape),
    "SelectBackward0": Rule(torch.select, (None,), _dims("dim", "index")),
    "SplitBackward0": Rule(torch.split, (None,), _dims("split_size", "dim"), has_several_outputs=True),
    "SplitWithSizesBackward0": Rule(
        torch.split_with_sizes, (None,), _dims("split_sizes", "dim"), has_several_outputs=True
    ),
    "UnbindBackward0": Rule(torch.unbind, (None,), _dims("dim"), has_several_outputs=True),
    "SliceBackward0": Rule(torch.ops.aten.slice.Tensor, (None,), _dims("dim", "start", "end", "step")),
    "PermuteBackward0": Rule(torch.permute, (None,), _dims("dims")),
    "TBackward0": Rule(torch.t, (None,)),
    "TransposeBackward0": Rule(torch.transpose, (None,), _dims("dim0", "dim1")),
}
RULES = {
    **_BY_INPUT,
    **BY_RESULT,
    **_BY_NEITHER,
    **VIEWS,
    # A view of a copy that `reshape` made, or of a matrix product.
    "UnsafeViewBackward0": Rule(torch.reshape, (None,), _shape, private=True),
}
# What csrc/thin/graph.cpp knows of the rules: the attributes with the saved operands, of nodes that do not save their
# result; the nodes whose output may be kept by themselves; and other kinds of nodes by name.
SAVED_BY = {
    name: tuple(None if saved is None else f"_raw_saved_{saved}" for saved in rule.saved or ())
    for name, rule in RULES.items()
    if name not in BY_RESULT
}
KEEPING = ATTENTIONS | KEEPING_RESULT | frozenset(BY_RESULT)
PRIVATE_READERS = frozenset(name for name, rule in RULES.items() if rule.private)
GATHERS = frozenset(name for name, rule in RULES.items() if rule.is_gather)
PRODUCTS = {
    "GroupedMmBackward0": Rule(_grouped_mm, ("self", "mat2"), _dtype, extras="offs"),
    "AddmmBackward0": Rule(_addmm, (None, "mat1", "mat2"), _attributes("beta", "alpha"), autocast_operand=0),
    "MmBackward0": Rule(torch.mm, ("self", "mat2")),
}
RULES_AND_PRODUCTS = RULES | PRODUCTS
# The product with the router's weight, which is no block, reads the last product of an expert.
RULES_AND_EXPERTS = RULES | {
    name: PRODUCTS[name]._replace(of_experts=True) for name in ("GroupedMmBackward0", "MmBackward0")
}
CONVOLUTIONS = {
    "ConvolutionBackward0": Rule(
        _convolution, ("input", "weight", None), _of_convolution, autocast_operand=2, omitted=_has_no_bias
    ),
}
RULES_IN_LAYERS = RULES_AND_PRODUCTS | CONVOLUTIONS
