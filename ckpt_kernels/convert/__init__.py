"""`convert(model)` makes the modules of a model compute with this package's fused kernels, in place.

    report = ckpt_kernels.convert(model)
    print(report)

Norms, activations, dropouts and gates are recognised by what they compute (`rules`); chains and MLPs by the source of a
module's methods (`code`, `rewriting`, `rotations`). User code runs on real tensors only, and no call leaves state for
the next. The modules stay the same objects (`swap`), and `revert` gives them their original classes back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .. import offload
from ..functional.mlps import tiles_for
from ..memory import kept_bytes
from ..model_argument import check_model
from .code.memoization import shared_results
from .late_modules import remove_late_conversion
from .model_conversion import ModelConversion
from .module_levels import Levels, LevelSource
from .module_tree import check_initialized, modules_of, named_modules
from .report import LeftAlone, Replaced, Report
from .rules.heads import heads_in
from .selection import choice_of
from .swap import is_converted, is_wrapped, swap_back

__all__ = ["LeftAlone", "Replaced", "Report", "convert", "is_converted", "revert"]


def convert(
    model: nn.Module,
    *,
    recompute: "str | Mapping[str, str] | LevelSource" = "output",
    include: Iterable[str | type[nn.Module]] | None = None,
    exclude: Iterable[str | type[nn.Module]] | None = None,
    logits: str | None = None,
    tiles: int = 1,
    inputs: Any = None,
) -> Report:
    """Makes the model's modules compute with this package's kernels, in place, and reports the replaced modules.

    Modules, parameters, buffers, hooks, names and modes stay the same. Results stay the same up to rounding, except
    for the random numbers of dropouts, which come from another stream. A converted model is reverted and converted
    anew.

    Args:
        model: any module. Modules that are not recognised are left alone.
        recompute: the tensors that the backward pass recomputes. "block": the intermediate results of each block, which
            keeps its inputs; the layer that reads the block's output keeps the output. "output": the outputs of blocks
            too (see `recompute.discard_outputs`). "all": also the matrix products that activations and gates read.
            "layer": all tensors in a layer, but for the layer's input and the tensors that its attention saves of the
            result (see `recompute.layer`). Layers are the members of a ModuleList that have norms, and the members of a
            Sequential that have two matrices too.
            Or levels by module: a `Plan`, or a mapping of modules' names (with * and ?) to levels. Each level holds for
            all modules below the name, and a later entry overrides an earlier one; modules without a level have
            "output". A mapping may also leave a module as it is, "none", or checkpoint a module, "checkpoint". All
            levels but "none" and "block" may state a number of tiles, "all, tiles=4", and all but "checkpoint" may move
            saved tensors to host memory, "output, offload" (see `offload.offload`).
        include: names of modules (with * and ?) or classes; only these modules and those below them are converted.
            None includes all.
        exclude: names or classes of modules that are left alone, with all modules below them.
        logits: the name (with * and ?) of the linear layer that computes a language model's logits, such as "lm_head".
            The logits are then computed when they are first read, and a cross entropy reads them in chunks; see
            `ckpt_kernels.logits`.
        tiles: the number of parts in which an MLP computes its rows, one after the other, except at "block" and where
            the MLP's level states another number; see `functional.mlp`.
        inputs: the inputs that the model is called with: a tensor, a tuple, or a dict by name. With inputs, the report
            has the bytes that a forward pass keeps before and after the conversion, measured on copies of the model.

    Returns:
        A `Report` of the modules that were replaced and left alone, which prints as a table.

    Raises:
        TypeError: `model` is no module, or is compiled already.
        ValueError: the level is unknown; a name fits no module, or the name `logits` fits a module that is no
            `nn.Linear`; or `tiles` is no positive number, or is more than 1 at "block".
        RuntimeError: a converted module was wrapped by a parametrization or by FSDP after its conversion.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> report = ckpt_kernels.convert(model, inputs=torch.randn(8, 64))
        >>> [(entry.name, entry.by) for entry in report.replaced]
        [('', 'norm, activation'), ('0', 'layer_norm'), ('1', 'bias_act (gelu)')]
        >>> before, after = report.kept
        >>> after < before
        True
    """
    check_model(model, "convert")
    levels, heads = Levels(model, recompute), heads_in(model, logits)
    tiles = tiles_for(tiles, levels.whole.level)
    if levels.has_offloaded:
        offload.warn_if_simulated(model)
    choices = choice_of(model, include, "include"), choice_of(model, exclude, "exclude")
    if inputs is not None:
        check_initialized(model)
    before = None if inputs is None else kept_bytes(model, inputs, revert)
    revert(model)
    try:
        with shared_results():
            report = ModelConversion(model, levels, *choices, tiles).run(heads)
    except BaseException:
        revert(model)
        raise
    return report if before is None else replace(report, kept=(before, kept_bytes(model, inputs)))


def revert(model: nn.Module) -> None:
    """Gives all converted modules of the model their original forward back. Other modules stay as they are.

    Args:
        model: a module.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: a converted module was wrapped by a parametrization or by FSDP after its conversion. Remove the
            wrapper first. The model is unchanged.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
        >>> _ = ckpt_kernels.convert(model)
        >>> ckpt_kernels.revert(model)
        >>> type(model[0]) is torch.nn.LayerNorm
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    for name, module in named_modules(model):
        if is_wrapped(module):
            raise RuntimeError(
                f"{name or 'the model'} was converted and has become {type(module).__name__} since; "
                "expected that to be undone before it is reverted or converted again"
            )
    for module in modules_of(model):
        if is_converted(module):
            swap_back(module)
            remove_late_conversion(module)
