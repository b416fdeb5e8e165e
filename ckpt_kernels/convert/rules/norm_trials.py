"""Which of our norms a module computes.

torch.nn's own are known by their forward. Any other module with vectors for parameters and no modules of its own is
tried out (see `trial`): what a stand-in computes of small random inputs, and the gradients of that, are held against
what our norms compute. A class's name does not count; where eps stands and what is rounded when does.
"""

import inspect
import itertools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as ours
from ..code.call_graph import is_unpatched
from ..code.memoization import memoized
from ..code.reachability import NotTriable
from ..loads import has_children, loads_plainly, tensors_of
from .channel_norms import BatchNorm, GroupNorm, InstanceNorm
from .likeness import looks_like_norm
from .norms import Case, Dtypes, Norm, RowNorm
from .trial import CHANNELS, ROWS, DoesNotTake, Outline, forward_of, in_a_thread_of_its_own, outline_of, takes_one

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# What torch's own norms compute.
_RULES: dict[type[nn.Module], Norm] = {
    nn.LayerNorm: RowNorm(True, "weight", "bias", "eps"),
    nn.RMSNorm: RowNorm(False, "weight", "", "eps"),
    nn.GroupNorm: GroupNorm(),
    **dict.fromkeys(_BATCH_NORMS, BatchNorm()),
    **dict.fromkeys(_INSTANCE_NORMS, InstanceNorm()),
}
_KNOWN = {kind: (kind.forward, kind.forward.__code__) for kind in _RULES if is_unpatched(kind.forward)}
# What their forwards read.
_READ = """affine bias elementwise_affine eps momentum normalized_shape num_batches_tracked num_channels num_features
    num_groups process_group running_mean running_var track_running_stats training weight""".split()
_OURS = tuple(getattr(ours, kind.__name__) for kind in _RULES)

_WIDE: Dtypes = (torch.float32, torch.float32)
_OTHERS: tuple[Dtypes, ...] = (
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)


def norm_of(module: nn.Module) -> tuple[Norm | None, str]:
    """The norm that a module computes, and where it computes none of ours but looks like a norm, why it does not."""
    if isinstance(module, _OURS):
        return None, ""
    kind = next((kind for kind, known in _KNOWN.items() if isinstance(module, kind) and _runs(module, *known)), None)
    if kind is not None and not loads_plainly(type(module), *_READ):
        return None, "computes what it reads"
    if kind is not None:
        return _RULES[kind], ""
    if not _may_be_row_norm(module):
        return None, "computes what none of our row norms computes" if looks_like_norm(module) else ""
    try:
        found = _tried_out(outline_of(module))
    except NotTriable as error:
        found = str(error)
    if isinstance(found, RowNorm):
        return found, ""
    return None, found if looks_like_norm(module) else ""


def _runs(module: nn.Module, forward: Callable[..., Tensor], code: types.CodeType) -> bool:
    return type(module).forward is forward and forward.__code__ is code


def _may_be_row_norm(module: nn.Module) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    if any(nn.parameter.is_lazy(p) or p.numel() < 2 for p in own):
        return False
    leaf = not has_children(module) and takes_one(type(module).forward)
    vectors = len(own) <= 2 and all(p.numel() == max(p.shape, default=0) for p in own)
    from_torch = type(module).__module__.startswith("torch.nn.modules.")
    return (
        leaf
        and vectors
        and len({p.numel() for p in own}) <= 1
        and (bool(own) or looks_like_norm(module))
        and not from_torch
    )


# Trying out


@memoized
@in_a_thread_of_its_own
def _tried_out(outline: Outline) -> RowNorm | str:
    """By float32 which norm it is, and then in which dtypes it rounds where ours does; or why it is none."""
    reasons = ["computes what none of our row norms computes"]
    for rule in _candidates(outline):
        try:
            if _agrees(outline, rule):
                return _with_cases(outline, rule)
        except NotTriable as error:
            reasons.append(str(error))
    return reasons[-1]


def _with_cases(outline: Outline, rule: RowNorm) -> RowNorm:
    options = [rule] if rule.centered else [rule, replace(rule, cast_before_weight=True)]
    found = [tuple(_cases_of(outline, option)) for option in options]
    best = max(range(len(options)), key=lambda index: len(found[index]))
    (case,) = rule.cases or ()
    wide = case._replace(keeps_data=_keeps_input(outline, rule, _WIDE, requires_grad=False))
    strided = not rule.channels_first and _lies_as_its_input(outline)
    return replace(options[best], cases=(wide, *found[best]), strided=strided)


def _lies_as_its_input(outline: Outline) -> bool:
    """Whether the output of a transposed input is transposed, and not contiguous."""
    made = outline.stand_in(torch.float32, torch.Generator("cpu").manual_seed(0))
    input = torch.ones(_sizes(outline, False)[0], device="cpu").transpose(0, 1)
    output = forward_of(made, input, ROWS, (-1,))
    if not output.is_contiguous() and output.stride() != input.stride():
        raise NotTriable("lies in memory as nothing of ours does")
    return not output.is_contiguous()


def _candidates(outline: Outline) -> Iterator[RowNorm]:
    names = tuple(outline.parameters)
    coefficients = list(itertools.permutations(names)) if len(names) == 2 else [(*names, "", "")[:2]]
    # Settings, numbers in the code, and torch's defaults.
    code = inspect.unwrap(outline.forward).__code__
    numbers = [c for c in code.co_consts if type(c) is float and 0 < c < 0.1]
    set_ones = [name for name, value in outline.settings if type(value) is float and 0 < value < 0.1]
    epsilons: list[Any] = [*dict.fromkeys([*set_ones, *numbers, 1e-5, 1e-6, torch.finfo(torch.float32).eps])]
    if "normalize" in code.co_names and outline.parameters:
        # F.normalize divides by the root of the sum, of 1e-12 at least.
        epsilons = [1e-24 / max(shape.numel() for shape in outline.parameters.values())]
    wide = (Case(_WIDE, torch.float32, True, False),)
    shapes = tuple(outline.parameters.items())
    for (weight, bias), eps, centered, first in itertools.product(coefficients, epsilons, (False, True), (False, True)):
        if bias and not centered:
            continue
        for offset, contiguous in itertools.product(
            (0.0, 1.0) if weight and not centered else (0.0,), (False, True) if first else (False,)
        ):
            if not first and any(len(shape) > 1 for shape in outline.parameters.values()):
                continue
            yield RowNorm(
                centered,
                weight,
                bias,
                eps,
                offset,
                channels_first=first,
                settings=outline.settings,
                code=outline.code,
                cases=wide,
                contiguous=contiguous,
                dimensions=len(_sizes(outline, first)[0]),
                shapes=shapes,
            )


def _cases_of(outline: Outline, rule: RowNorm) -> Iterator[Case]:
    """Those, other than float32, in which the module makes what ours does."""
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
    made = outline.stand_in(dtypes[1], torch.Generator("cpu").manual_seed(0))
    input = torch.zeros(_sizes(outline, rule.channels_first)[0], dtype=dtypes[0], device="cpu")
    input.requires_grad_(requires_grad)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda packed: packed):
        _theirs(made, rule, input)
    return input.data_ptr() in kept


def _agrees(outline: Outline, rule: RowNorm) -> bool:
    """Whether rule and module compute the same of the same, in the one case that the rule has."""
    ((dtypes, *_),) = rule.cases or ()
    generator = torch.Generator("cpu").manual_seed(0)
    made = outline.stand_in(dtypes[1], generator)
    # Inputs are large, and so small that eps decides.
    for sizes, scale in itertools.product(_sizes(outline, rule.channels_first), (1.0, 1e-3)):
        input = ((torch.randn(sizes, generator=generator, device="cpu") + 0.5) * scale).to(dtypes[0])
        try:
            theirs = _with_gradients(made, input, lambda x: _theirs(made, rule, x))
            mine = _with_gradients(made, input, lambda x: rule.compute(made, x, "identity"))
            if theirs[0].dtype != mine[0].dtype:
                return False
            if not _close(theirs, mine, dtypes, scale):
                # What rounds as torch's own function does is as good: ours takes the place of that.
                torchs = _with_gradients(made, input, lambda x: rule.computed_by_torch(made, x))
                if not _close(theirs, torchs, dtypes, scale):
                    return False
        except (DoesNotTake, RuntimeError, ValueError, TypeError, IndexError):
            return False
    return True


def _theirs(made: nn.Module, rule: RowNorm, input: Tensor) -> Tensor:
    if rule.channels_first:
        return forward_of(made, input, CHANNELS, (1, -1))
    return forward_of(made, input, ROWS, (-1,))


def _sizes(outline: Outline, channels_first: bool) -> list[tuple[int, ...]]:
    """Of inputs to try. A norm without weights is tried with rows of two lengths, if it does not say which it takes."""
    shapes = list(outline.parameters.values())
    said = dict(outline.settings).get("normalized_shape")
    columns = [math.prod(said) if isinstance(said, tuple) else said] if said else [48, 77]
    columns = [shapes[0].numel()] if shapes else columns
    # Of a weight with more dimensions, such as (C, 1, 1), those that follow say how much space there is.
    space = max((len(shape) - 1 - shape.index(columns[0]) for shape in shapes), default=0) or 2
    return [(2, c, *(6, 5, 4, 3)[:space]) if channels_first else (2, 60, c) for c in columns]


def _with_gradients(made: nn.Module, input: Tensor, compute: Callable[[Tensor], Tensor | None]) -> list[Tensor]:
    """The output, and gradients of a projection of it."""
    input = input.clone().requires_grad_()
    output = compute(input)
    if output is None:
        raise DoesNotTake("takes other shapes")
    if not output.requires_grad:
        raise NotTriable("has no gradient")
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device="cpu").view(output.shape)
    wanted = [input, *tensors_of(made)]
    found = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    return [output.detach(), *[torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]]


def _close(theirs: list[Tensor], mine: list[Tensor], dtypes: Dtypes, scale: float) -> bool:
    if any(a.shape != b.shape for a, b in zip(theirs, mine, strict=True)) or theirs[0].stride() != mine[0].stride():
        return False
    # Where two roundings fall elsewhere, a tenth of all results and more do.
    # Of narrow inputs and wide weights ours may be more exact; there the dtype is what is in question.
    narrow = dtypes[0].itemsize < 4
    rtol = 1e-5 if not narrow else 0.0 if dtypes[0] == dtypes[1] else 0.02
    (output, *gradients), (ours, *others) = ([t.double() for t in results] for results in (theirs, mine))
    if (~torch.isclose(output, ours, rtol=rtol, atol=1e-6 * scale)).double().mean() > 0.01:
        return False
    allowed = 0.05 if narrow else 1e-4
    return all((a - b).abs().max() <= allowed * a.abs().max() + 1e-12 for a, b in zip(gradients, others, strict=True))
