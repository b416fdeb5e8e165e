"""torchtitan: a model converter, for the versions that have converters (0.2), and a model's specification for 0.3.

    # 0.2: in a module that experimental.custom_import names; then model.converters = ["ckpt_kernels"]
    register_model_converter(converter("output"), "ckpt_kernels")
    # 0.3: where the specification of the model is made
    spec = with_conversion(spec, "output")

Both convert on the meta device, before the model is sharded. A budget cannot be planned for there: make a plan of the
model elsewhere, save it, and give its file.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .common import Planned, Recompute, converted, parsed

Spec = TypeVar("Spec")


def converter(recompute: Recompute = "output", *, logits: str | None = None, tiles: int = 1) -> type:
    """A class with the methods of torchtitan's `ModelConverter`.

    Args:
        recompute: a level, levels by name, a plan or its file; see `common.parsed`.
        logits, tiles: see `ckpt_kernels.convert`.

    Raises:
        TypeError, ValueError: `recompute` has no known form, or a budget.

    Example:
        >>> from ckpt_kernels.integrations.torchtitan import converter
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> converter("output")(job_config=None, parallel_dims=None).convert(model)
        >>> ckpt_kernels.is_converted(model)
        True
    """
    wanted = _not_planned(recompute)

    class CheckpointKernelsConverter:
        def __init__(self, job_config: Any, parallel_dims: Any) -> None:
            pass

        def convert(self, model: nn.Module) -> None:
            converted(model, wanted, logits=logits, tiles=tiles)

        def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
            pass

    return CheckpointKernelsConverter


def with_conversion(spec: Spec, recompute: Recompute = "output", *, logits: str | None = None, tiles: int = 1) -> Spec:
    """A copy of a model's specification whose `parallelize_fn` first converts the model.

    Args:
        spec: a `torchtitan.protocols.model_spec.ModelSpec`.
        recompute, logits, tiles: as in `converter`.

    Returns:
        A copy of the specification.

    Raises:
        TypeError, ValueError: as in `converter`; or `spec` has no `parallelize_fn`.

    Example:
        >>> import dataclasses
        >>> from ckpt_kernels.integrations.torchtitan import with_conversion
        >>> ModelSpec = dataclasses.make_dataclass("ModelSpec", ["parallelize_fn"])  # stands for torchtitan's
        >>> spec = with_conversion(ModelSpec(parallelize_fn=lambda model, *args, **kwargs: model), "output")
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> ckpt_kernels.is_converted(spec.parallelize_fn(model))
        True
    """
    wanted = _not_planned(recompute)
    if isinstance(spec, type) or not dataclasses.is_dataclass(spec) or not hasattr(spec, "parallelize_fn"):
        raise TypeError(f"spec is {type(spec).__name__}; expected a ModelSpec, a dataclass with a parallelize_fn")
    parallelize: Callable[..., nn.Module] = spec.parallelize_fn

    def parallelize_fn(model: nn.Module, /, *args: Any, **kwargs: Any) -> nn.Module:
        converted(model, wanted, logits=logits, tiles=tiles)
        return parallelize(model, *args, **kwargs)

    return dataclasses.replace(spec, parallelize_fn=parallelize_fn)  # type: ignore[type-var]


def _not_planned(recompute: Recompute) -> Any:
    """The parsed value; a budget raises ValueError."""
    wanted = parsed(recompute)
    if isinstance(wanted, Planned):
        raise ValueError(
            f"recompute is {recompute!r}, a budget, for which the model would have to run on the meta "
            "device; expected a level, levels by name, or a plan's .json file"
        )
    return wanted
