"""Recognises the norm that a module computes.

torch.nn's own norms are recognised by their forward. Any other module without children whose parameters are vectors is
tried (see `trial`): outputs and gradients of a stand-in on small random inputs are compared with those of the fused
norms. The name of the class does not count; the place of eps and the order of roundings do.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as ours
from ..attribute_loads import loads_plainly
from ..code.call_graph import reachable_functions
from ..code.code_objects import names_in
from ..code.memoization import memoized_for_good
from ..code.snapshots import NotTriable
from ..module_tree import children_of, tensors_of
from ..operands import has_forward_of
from .channel_norms import BatchNorm, GroupNorm, InstanceNorm
from .likeness import NORMS, has_name_of_norm_or_activation, looks_like_norm
from .norm_accuracy import are_as_exact, are_close
from .norm_inputs import ROW_DIMENSIONS, input_shapes, keeps_strides, spatial_dimensions
from .norms import Case, Dtypes, Norm, RowNorm
from .trial import (
    CHANNELS,
    ROWS,
    InputRefused,
    Outline,
    in_own_thread,
    outline_of,
    recording_saved_tensors,
    result_of,
    takes_one_argument,
)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# The rules for torch's own norms.
TORCH_NORMS: dict[type[nn.Module], Norm] = {
    nn.LayerNorm: RowNorm(True, "weight", "bias", "eps"),
    nn.RMSNorm: RowNorm(False, "weight", "", "eps"),
    nn.GroupNorm: GroupNorm(),
    **dict.fromkeys(_BATCH_NORMS, BatchNorm()),
    **dict.fromkeys(_INSTANCE_NORMS, InstanceNorm()),
}
# The attributes that their forwards read.
READ = """affine bias elementwise_affine eps momentum normalized_shape num_batches_tracked num_channels num_features
    num_groups process_group running_mean running_var track_running_stats training weight""".split()
_OURS = tuple(getattr(ours, kind.__name__) for kind in TORCH_NORMS)

# The smallest values tried. F.normalize, which bounds the norm at 1e-12 where an eps would be added, agrees with ours
# above.
_SMALLEST = 1e-8
_OTHER = "computes what none of our row norms computes"
# The functions and methods with a reduction that the code of a norm may name.
_REDUCTIONS = frozenset("layer_norm mean norm normalize rms_norm sum var".split())
# Parameters in float32 and float64 are random over so many powers of two above and below 1.
_WIDE_SPREAD = 20
_WIDE: Dtypes = (torch.float32, torch.float32)
_OTHERS: tuple[Dtypes, ...] = (
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)


def norm_of(module: nn.Module, name: str = "") -> tuple[Norm | None, str]:
    """The rule for the norm that a module computes, and ""; or None, and a reason if the module looks like a norm, or
    has been tried and has the name of one in the model."""
    if isinstance(module, _OURS):
        return None, ""
    for kind, rule in TORCH_NORMS.items():
        if isinstance(module, kind) and has_forward_of(type(module), kind):
            is_plain = loads_plainly(type(module), *READ)
            return (rule, "") if is_plain else (None, "computes the settings that its forward reads")
    if why_not := _why_no_trial(module):
        return None, why_not if looks_like_norm(module) else ""
    try:
        result = _tried(outline_of(module, every_dtype=True))
    except NotTriable as error:
        result = str(error)
    if isinstance(result, RowNorm):
        return result, ""
    return None, result if looks_like_norm(module) or has_name_of_norm_or_activation(name) else ""


def _why_no_trial(module: nn.Module) -> str:
    """Why a module is not tried, or "": tried are leaf modules outside torch.nn that have one or two vectors of one
    length, or whose code names a reduction."""
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(map(nn.parameter.is_lazy, parameters)):
        return "has parameters that are not initialized"
    if children_of(module) or type(module).__module__.startswith("torch.nn.modules."):
        return _OTHER
    if not takes_one_argument(type(module).forward):
        return "takes more than one tensor"
    are_vectors = len(parameters) <= 2 and all(1 < p.numel() == max(p.shape, default=0) for p in parameters)
    if not are_vectors or len({p.numel() for p in parameters}) > 1:
        return "has other parameters than one or two vectors of the same length"
    return "" if parameters or _reduces(type(module)) else "names no reduction that our row norms compute"


def _reduces(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class may reduce a dimension, by the names in its code or as that of a norm of torch."""
    names = (names_in(function.__code__) for function in reachable_functions(kind))
    return issubclass(kind, NORMS) or not _REDUCTIONS.isdisjoint(itertools.chain.from_iterable(names))


@memoized_for_good
@in_own_thread
def _tried(outline: Outline) -> RowNorm | str:
    """The rule, found by a trial in float32, with the dtypes in which roundings agree too; or the reason for none."""
    reason, has_run = "", False
    for rule in _candidates(outline):
        try:
            if _agrees_or_refuses(outline, rule):
                return _with_cases(outline, rule)
            has_run = True
        except NotTriable as error:
            reason = reason if isinstance(error, InputRefused) else str(error)
    # A trial that ran to its end has seen no operation that is not allowed.
    return _OTHER if has_run or not reason else reason


def _with_cases(outline: Outline, rule: RowNorm) -> RowNorm:
    """The rule with the cases of all dtypes, from the variant of the rule that agrees in most."""
    if not rule.channels_first:
        each = (replace(rule, dimensions=(count,)) for count in ROW_DIMENSIONS)
        rule = replace(rule, dimensions=tuple(one.dimensions[0] for one in each if _agrees(outline, one)))
    options = [rule] if rule.centered else [rule, replace(rule, cast_before_weight=True)]
    cases = [tuple(_cases_of(outline, option)) for option in options]
    best = max(range(len(options)), key=lambda index: len(cases[index]))
    (case,) = rule.cases or ()
    wide = case._replace(keeps_data=_keeps_input(outline, rule, _WIDE, requires_grad=False))
    module, first = outline.stand_in(torch.float32), rule.channels_first
    sizes = input_shapes(outline, first, rule.dimensions if first else (3,))[0]
    strided = keeps_strides(functools.partial(_output_of, module, first), sizes, first)
    return replace(options[best], cases=(wide, *cases[best]), strided=strided)


def _candidates(outline: Outline) -> Iterator[RowNorm]:
    """All rules in float32 that the module's parameters and epsilons allow."""
    names = tuple(outline.parameters)
    coefficients = [(*names, "", "")[:2]]
    if len(names) == 2:
        # The forward may use only one.
        coefficients = [*itertools.permutations(names), *((name, "") for name in names)]
    # Epsilons come from settings, from numbers in the code, and from torch's defaults.
    code = inspect.unwrap(outline.forward).__code__
    numbers = [c for c in code.co_consts if type(c) is float and 0 < c < 0.1]
    settings = [name for name, value in outline.settings if type(value) is float and 0 < value < 0.1]
    epsilons: list[Any] = [*dict.fromkeys([*settings, *numbers, 1e-5, 1e-6, torch.finfo(torch.float32).eps])]
    if _normalizes(outline) and outline.parameters:
        # F.normalize divides by the root of the sum, not of the mean, and by 1e-12 at least.
        epsilons = [1e-24 / max(shape.numel() for shape in outline.parameters.values())]
    wide = (Case(_WIDE, torch.float32, True, False),)
    has_maps = any(len(shape) > 1 for shape in outline.parameters.values())
    for (weight, bias), eps, centered, first in itertools.product(coefficients, epsilons, (False, True), (False, True)):
        if (bias and not centered) or (has_maps and not first):
            continue
        offsets = (0.0, 1.0) if weight and not centered else (0.0,)
        for offset, contiguous in itertools.product(offsets, (False, True) if first else (False,)):
            yield RowNorm(
                *(centered, weight, bias, eps, offset),
                channels_first=first,
                settings=outline.settings,
                code=outline.code,
                cases=wide,
                contiguous=contiguous,
                dimensions=(2 + spatial_dimensions(outline),) if first else (3,),
                shapes=outline.shapes,
            )


def _cases_of(outline: Outline, rule: RowNorm) -> Iterator[Case]:
    """The cases other than float32 in which the module agrees with the rule."""
    for pair in _OTHERS:
        if pair[0] != pair[1] and not outline.parameters:
            continue
        for output in dict.fromkeys((pair[0], torch.promote_types(*pair))):
            case = Case(pair, output, True, True)
            if _agrees(outline, replace(rule, cases=(case,))):
                keeps = (_keeps_input(outline, rule, pair, requires_grad) for requires_grad in (True, False))
                yield Case(pair, output, *keeps)
                break


def _keeps_input(outline: Outline, rule: RowNorm, dtypes: Dtypes, requires_grad: bool) -> bool:
    """Whether autograd saves the input itself for the module's backward pass."""
    module = outline.stand_in(dtypes[1])
    input = torch.zeros(_shapes_for(outline, rule)[0], dtype=dtypes[0], device="cpu")
    input.requires_grad_(requires_grad)
    with recording_saved_tensors() as is_saved:
        _output_of(module, rule.channels_first, input)
    return is_saved(input)


def _agrees(outline: Outline, rule: RowNorm) -> bool:
    """Whether rule and module compute the same outputs and gradients, in the one case that the rule has."""
    try:
        return _agrees_or_refuses(outline, rule)
    except InputRefused:
        return False


def _agrees_or_refuses(outline: Outline, rule: RowNorm) -> bool:
    """As `_agrees`, but raises `InputRefused` if the module takes other inputs."""
    ((dtypes, *_),) = rule.cases or ()
    generator = torch.Generator("cpu").manual_seed(0)
    # One input has usual values, the other such small ones that the place of eps shows, in float32 at least.
    eps: float = dict(outline.settings)[rule.eps] if isinstance(rule.eps, str) else rule.eps
    small = min(1e-3, max(math.sqrt(eps), _SMALLEST)) if dtypes == _WIDE else 1e-3
    spread = {} if dtypes[0].itemsize < 4 else {"spread": _WIDE_SPREAD}
    for sizes, scale in zip(_shapes_for(outline, rule), itertools.cycle((1.0, small)), strict=False):
        module = outline.stand_in(dtypes[1], generator, **spread)
        input = ((torch.randn(sizes, generator=generator, device="cpu") + 0.5) * scale).to(dtypes[0])
        try:
            if not _agrees_for(outline, rule, module, input, scale):
                return False
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputRefused("takes other inputs") from error
    return True


def _agrees_for(outline: Outline, rule: RowNorm, module: nn.Module, input: Tensor, scale: float) -> bool:
    """Whether rule and module compute the same from this input, whose values are of that scale."""
    ((dtypes, *_),) = rule.cases or ()
    expected = _with_gradients(module, input, lambda x: _output_of(module, rule.channels_first, x))
    fused = _with_gradients(module, input, lambda x: rule.compute(module, x, "identity"))
    if expected[0].dtype != fused[0].dtype:
        return False
    if are_close(expected, fused, dtypes, scale):
        return True
    # A module that rounds as torch's own norm does passes too, because the fused norm replaces that one.
    if _normalizes(outline) and dtypes[0] == dtypes[1] != torch.float32:
        return are_as_exact(_truth(outline, rule, module, input), expected, fused)
    of_torch = _with_gradients(module, input, lambda x: rule.computed_by_torch(module, x))
    return are_close(expected, of_torch, dtypes, scale)


def _shapes_for(outline: Outline, rule: RowNorm) -> list[tuple[int, ...]]:
    return input_shapes(outline, rule.channels_first, rule.dimensions)


def _normalizes(outline: Outline) -> bool:
    """Whether the forward calls `F.normalize`, which rounds a length, a quotient and each factor after that."""
    return "normalize" in inspect.unwrap(outline.forward).__code__.co_names


def _truth(outline: Outline, rule: RowNorm, module: nn.Module, input: Tensor) -> list[Tensor]:
    """The outputs and gradients in float64, for the same numbers."""
    wide = outline.stand_in(torch.float64)
    for parameter, narrow in zip(tensors_of(wide), tensors_of(module), strict=True):
        parameter.data = narrow.detach().double()
    return _with_gradients(wide, input.double(), lambda x: _output_of(wide, rule.channels_first, x), input.dtype)


def _output_of(module: nn.Module, channels_first: bool, input: Tensor) -> Tensor:
    """The stand-in's output, with the operations allowed that such a norm needs."""
    operations, dimensions = (CHANNELS, (1, -1)) if channels_first else (ROWS, (-1,))
    return result_of(functools.partial(type(module).forward, module), input, operations, dimensions)


def _with_gradients(
    module: nn.Module,
    input: Tensor,
    compute: Callable[[Tensor], Tensor | None],
    weights_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The output, and the gradients of a sum of the output with weights of that dtype, None for the output's."""
    input = input.clone().requires_grad_()
    output = compute(input)
    if output is None:
        raise InputRefused("takes other shapes")
    if not output.requires_grad:
        raise NotTriable("has no gradient")
    weights = torch.rand(output.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu") * 2 - 1
    weights = weights.to(weights_dtype or output.dtype)
    inputs = [input, *tensors_of(module)]
    gradients = torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, inputs, strict=True)]
    return [output.detach(), *filled]
