"""Random calls of the public functions: operands of any shape, layout and dtype, sometimes with one invalid argument.

Each parameter is drawn by name, so that a function is covered as soon as it is public. A parameter without an entry
here fails the test.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from ckpt_kernels import functional
from ckpt_kernels.activations import NAMES

from .conftest import DEVICE, DTYPES

Draw = Callable[[st.SearchStrategy], Any]

CHANNELS = ("batch_norm", "group_norm", "instance_norm")
LAYOUTS = ("plain", "transposed", "sliced", "strided", "odd offset", "expanded")


@dataclass(frozen=True)
class Call:
    """A public function and its arguments by name. `nonsense` is the name of the invalid argument."""

    function: str
    arguments: dict[str, Any]
    nonsense: str | None = None
    special: bool = False
    columns: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """All tensors among the arguments."""
        found = {}
        for name, value in self.arguments.items():
            for index, one in enumerate(value if isinstance(value, list | tuple) else [value]):
                if isinstance(one, Tensor):
                    found[f"{name} {index}"] = one
        return found

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The same call with `change` applied to each tensor."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return type(value)(map(changed, value)) if isinstance(value, list | tuple) else value

        return replace(self, arguments={name: changed(value) for name, value in self.arguments.items()})

    def __call__(self) -> list[Tensor]:
        outputs = getattr(functional, self.function)(**self.arguments)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]


@dataclass
class _Shapes:
    """The sizes and the dtype that the operands of one call share."""

    draw: Draw
    dtype: torch.dtype
    lead: tuple[int, ...]
    columns: int
    special: bool
    hidden: int
    seed: int
    drawn: int = field(default=0)

    def tensor(self, *shape: int, layout: str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of random values, in a random memory layout, that may or may not require a gradient."""
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.seed + self.drawn)
        layout = layout or self.draw(st.sampled_from(LAYOUTS))
        value = torch.randn(shape, generator=generator)
        if self.special and value.numel():
            kinds = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, -1e-45, 3e38, 0.0])
            where = torch.rand(shape, generator=generator) < 0.1
            value = torch.where(where, kinds[torch.randint(len(kinds), shape, generator=generator)], value)
        value = laid_out(value.to(dtype or self.dtype).to(DEVICE), layout)
        return value.requires_grad_(self.draw(st.booleans()))

    def vector(self, length: int) -> Tensor:
        """A vector of coefficients, of the input's dtype or float32."""
        return self.tensor(length, dtype=self.draw(st.sampled_from((self.dtype, torch.float32))))

    def maybe(self, length: int) -> Tensor | None:
        return self.vector(length) if self.draw(st.booleans()) else None

    @property
    def rotary_dim(self) -> int:
        return 2 * min(self.hidden, self.columns // 2)

    def table(self) -> Tensor:
        """A table of cosines or sines: one or two entries a rotated pair, for some of the last leading dimensions."""
        lead = self.lead[self.seed % (len(self.lead) + 1) :]
        sizes = [self.draw(st.sampled_from((size, 1))) for size in lead]
        entries = self.rotary_dim if self.seed // 8 % 2 else self.rotary_dim // 2
        return self.tensor(*sizes, entries, dtype=self.draw(st.sampled_from(DTYPES[: 4 if DEVICE == "cpu" else 3])))


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same values with other strides or at another offset; "expanded" repeats one of the values."""
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and value.dim():
        return torch.cat([value, value], 0)[: value.shape[0]]
    if layout == "strided" and value.dim():
        return torch.stack([value, value], -1)[..., 0]
    if layout == "odd offset":
        return torch.cat([value.new_zeros(1), value.reshape(-1)])[1:].view(value.shape)
    if layout == "expanded" and value.dim() > 1 and value.shape[0]:
        return value[:1].expand(value.shape)
    return value


# How a valid value is drawn, by parameter.
_OPTIONS: dict[str, Callable[[_Shapes], Any]] = {
    "eps": lambda s: s.draw(st.sampled_from((1e-5, 1e-6, 1e-3))),
    "activation": lambda s: s.draw(st.sampled_from(NAMES)),
    "pre_activation": lambda s: s.draw(st.sampled_from(("identity", "identity", *NAMES))),
    "weight_offset": lambda s: s.draw(st.sampled_from((0.0, 1.0))),
    "cast_before_weight": lambda s: s.draw(st.booleans()),
    "dropout_p": lambda s: s.draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
    "training": lambda s: s.draw(st.booleans()),
    "use_input_stats": lambda s: s.draw(st.booleans()),
    "momentum": lambda s: s.draw(st.sampled_from((0.1, 0.0, 1.0))),
    "norm_before_gate": lambda s: s.draw(st.booleans()),
    "layout": lambda s: s.draw(st.sampled_from(("gate_first", "value_first", "interleaved"))),
    "recompute": lambda s: s.draw(st.sampled_from(("block", "output", "all"))),
    "process_group": lambda s: None,
    "limit": lambda s: s.draw(st.sampled_from((None, None, 0.5))),
    "offset": lambda s: s.draw(st.sampled_from((0.0, 1.0))),
}
_ROWS: dict[str, Callable[[_Shapes], Any]] = {
    **dict.fromkeys(("input", "residual", "gate", "value"), lambda s: s.tensor(*s.lead, s.columns)),
    **dict.fromkeys(("scale", "shift"), lambda s: s.tensor(*s.lead[:1], *[1] * len(s.lead[1:]), s.columns)),
    **dict.fromkeys(("weight", "bias", "norm_weight", "norm_bias"), lambda s: s.maybe(s.columns)),
    "normalized_shape": lambda s: s.draw(st.sampled_from((s.columns, (s.columns,)))),
}
_LINEAR: dict[str, Callable[[_Shapes], Any]] = {
    **_ROWS,
    **dict.fromkeys(("weight1", "gate_weight", "value_weight"), lambda s: s.tensor(s.hidden, s.columns)),
    **dict.fromkeys(("bias1", "gate_bias", "value_bias"), lambda s: s.draw(st.none() | st.just(s.tensor(s.hidden)))),
    "weight2": lambda s: s.tensor(3, s.hidden),
    "bias2": lambda s: s.draw(st.none() | st.just(s.tensor(3))),
    "norm": lambda s: s.draw(st.sampled_from(("layer_norm", "rms_norm"))),
    "bias": lambda s: s.draw(st.none() | st.just(s.tensor(3))),
}
_IMAGES: dict[str, Callable[[_Shapes], Any]] = {
    **dict.fromkeys(("input", "residual"), lambda s: s.tensor(*s.lead, s.columns)),
    **dict.fromkeys(("weight", "bias"), lambda s: s.maybe(s.lead[1])),
    "running_mean": lambda s: torch.zeros(s.lead[1], device=DEVICE) if s.draw(st.booleans()) else None,
    "running_var": lambda s: torch.ones(s.lead[1], device=DEVICE) if s.draw(st.booleans()) else None,
    "num_groups": lambda s: s.draw(st.sampled_from([g for g in range(1, s.lead[1] + 1) if s.lead[1] % g == 0] or [1])),
}
_LAYOUTS = st.sampled_from(("halves", "interleaved"))
_ROTARY: dict[str, Callable[[_Shapes], Any]] = {
    **_ROWS,
    **dict.fromkeys(("query", "key"), _ROWS["input"]),
    **dict.fromkeys(("query_weight", "key_weight", "query_bias", "key_bias"), _ROWS["weight"]),
    **dict.fromkeys(("cos", "sin"), lambda s: s.table()),
    "layout": lambda s: s.draw(_LAYOUTS),
    "output_layout": lambda s: s.draw(st.none() | _LAYOUTS),
    "rotary_dim": lambda s: s.rotary_dim,
    "rotary_start": lambda s: s.draw(st.sampled_from((0, (s.columns - s.rotary_dim) // 2, s.columns - s.rotary_dim))),
    "norm": lambda s: s.draw(st.sampled_from((None, "rms", "layer"))),
}
_BY_FUNCTION: dict[str, dict[str, Callable[[_Shapes], Any]]] = {
    **dict.fromkeys(CHANNELS, _IMAGES),
    "bias_act": {**_ROWS, "bias": lambda s: s.maybe(s.columns)},
    "dyt": {**_ROWS, "alpha": lambda s: s.vector(1)},
    **dict.fromkeys(("rotary", "rotary_qk"), _ROTARY),
    "packed_glu": {"input": lambda s: s.tensor(*s.lead, 2 * s.columns)},
    "norm_linear": {**_LINEAR, "weight": lambda s: s.tensor(3, s.columns)},
    "act_linear": {**_LINEAR, "weight": lambda s: s.tensor(3, s.columns)},
    "mlp": _LINEAR,
    "gated_mlp": {**_LINEAR, "weight": lambda s: s.tensor(3, s.hidden)},
}


def _nonsense(draw: Draw, value: Any) -> Any:
    """An invalid replacement for `value`; for a tensor usually another tensor."""
    plain: list[Any] = [None, "x", -1, 0, 3.7, float("nan"), float("inf"), 2**40, [], (), object(), True, torch.float32]
    if not isinstance(value, Tensor) or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(plain))
    given = value.detach()
    changes: list[Callable[[], Tensor]] = [
        lambda: given.long() if given.isfinite().all() else given.bool(),
        lambda: given.to(torch.complex64),
        lambda: given.bool(),
        lambda: given.double(),
        lambda: given.half(),
        lambda: given.to("meta"),
        lambda: given.unsqueeze(0),
        lambda: given.reshape(-1),
        lambda: given[..., :0],
        lambda: torch.cat([given, given], -1),
        lambda: given.new_zeros(()),
        lambda: given.new_zeros(0),
        lambda: given.to_sparse(),
    ]
    return draw(st.sampled_from(changes))()


def _parameters(function: Callable) -> tuple[str, ...]:
    """The names of the parameters. `rotary_qk` passes options to `rotary`, whose parameters are included."""
    parameters = inspect.signature(function).parameters
    if "options" not in parameters:
        return tuple(parameters)
    others = inspect.signature(functional.rotary).parameters.values()
    return *(p for p in parameters if p != "options"), *(p.name for p in others if p.kind is p.KEYWORD_ONLY)


# The functions of blocks. A loss also takes class indices.
_BLOCKS = tuple(name for name in functional.__all__ if name != "linear_cross_entropy")


@st.composite
def calls(draw: Draw, functions: tuple[str, ...] = _BLOCKS) -> Call:
    """A call of one of the functions; one call in three has an invalid argument."""
    function = draw(st.sampled_from(functions))
    channels = function in CHANNELS
    sizes = st.integers(1, 9) | st.just(0)
    lead = tuple(draw(st.lists(sizes, min_size=2 if channels else 0, max_size=3)))
    shapes = _Shapes(
        draw,
        draw(st.sampled_from(DTYPES if DEVICE == "cpu" else DTYPES[:3])),
        lead,
        draw(st.integers(1, 70) | st.integers(1, 70) | st.sampled_from((0, 255, 1024, 5000))),
        draw(st.integers(0, 4)) == 0,
        draw(st.integers(1, 9)),
        draw(st.integers(0, 2**20)),
    )
    drawers = _OPTIONS | _BY_FUNCTION.get(function, _ROWS)
    parameters = _parameters(getattr(functional, function))
    # `tiles` changes no result, and is an error at some recompute levels.
    arguments = {name: drawers[name](shapes) for name in parameters if name != "tiles"}
    if arguments.get("norm") == "layer_norm":
        arguments |= {"weight_offset": 0.0, "cast_before_weight": False}
    elif "norm_bias" in arguments:
        arguments["norm_bias"] = None
    elif "norm" in arguments and arguments["norm"] is None:
        arguments |= {name: None for name in parameters if name.endswith(("weight", "bias"))}
    wrong = draw(st.sampled_from(list(arguments))) if draw(st.integers(0, 2)) == 0 else None
    if wrong is not None:
        arguments[wrong] = _nonsense(draw, arguments[wrong])
    return Call(function, arguments, wrong, shapes.special, shapes.columns)
