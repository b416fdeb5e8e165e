"""What a block is in the catalogue, and how one is declared: beside its eager twin."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional

Operands = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, ...]]


class Traffic(NamedTuple):
    """What must cross memory in one pass, in tensors of the block's shape."""

    read: int
    written: int


@dataclass(frozen=True)
class Block:
    """One public function with one choice of options.

    `call` is ours, `eager` the same in eager torch; both take the operands by name and return a tuple of `outputs`
    tensors. `rows` have the block's shape, or twice its columns where they are `packed`; `numbers` have one element;
    `coefficients` are vectors, as long as the columns or, where there are `channels`, as the second dimension;
    `samples` have a row for each index of the first dimension; `tables`, which want no gradient, one for each of the
    last before the columns, with an entry for two columns. `kept` names what may be kept for backward ("output 1"
    is the second output); `statistics` tells how many numbers beside these, for an input of (samples, tokens or
    channels, ...). `gradients` is how many tensors of the block's shape the backward pass writes, if not one for each
    of `rows`.
    """

    name: str
    function: str
    formula: str
    options: Mapping[str, Any]
    call: Function
    eager: Function
    rows: Sequence[str] = ("input",)
    numbers: Sequence[str] = ()
    coefficients: Sequence[str] = ("weight", "bias")
    samples: Sequence[str] = ()
    tables: Sequence[str] = ()
    packed: bool = False
    channels: bool = False
    outputs: int = 1
    kept: Sequence[str] = ("input",)
    statistics: Callable[[int, int], int] = lambda samples, tokens: 2 * samples * tokens
    gradients: int | None = None

    def operands(self, lead: Sequence[int], columns: int, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
        """Random operands, all wanting gradients but the tables; `lead` has two dimensions or more."""
        found = random_operands(self.shapes(lead, columns), self.parameters, dtype, device, seed)
        return found | {name: found[name].detach() for name in self.tables}

    def empty_operands(self, lead: Sequence[int], columns: int, dtype: torch.dtype, device: str) -> Operands:
        """The same without values, such as those of the meta device."""
        found = empty_operands(self.shapes(lead, columns), dtype, device)
        return found | {name: found[name].detach() for name in self.tables}

    def shapes(self, lead: Sequence[int], columns: int) -> dict[str, tuple[int, ...]]:
        """The shape of each operand."""
        shapes = {name: (*lead, 2 * columns if self.packed else columns) for name in self.rows}
        shapes |= {name: (1,) for name in self.numbers}
        shapes |= {name: ((*lead, columns)[1 if self.channels else -1],) for name in self.coefficients}
        shapes |= {name: (lead[0], *[1] * (len(lead) - 1), columns) for name in self.samples}
        return shapes | {name: (*lead[-1:], columns // 2) for name in self.tables}

    @property
    def parameters(self) -> Sequence[str]:
        """Operands that are a module's parameters."""
        return (*self.numbers, *self.coefficients)

    @property
    def forward(self) -> Traffic:
        """Operands are read once, and the input of a channel norm again when its statistics are known."""
        return Traffic(self._tensors(self.rows) + self.channels, self.outputs)

    @property
    def backward(self) -> Traffic:
        """What is kept and the incoming gradients are read, by a channel norm again when its sums are known."""
        read = self._tensors(self.kept) + self.outputs
        written = self._tensors(self.rows) if self.gradients is None else self.gradients
        return Traffic(2 * read if self.channels else read, written)

    def _tensors(self, names: Sequence[str]) -> int:
        """How many tensors of the block's shape they are."""
        return (2 if self.packed else 1) * len(set(names).difference(self.samples, self.tables))


def random_operands(
    shapes: Mapping[str, Sequence[int]], parameters: Collection[str], dtype: torch.dtype, device: str, seed: int
) -> Operands:
    """Random tensors that want gradients: weights of linear layers scaled by their width, those of norms around 1."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        if name in parameters and len(shape) == 2:
            values *= shape[1] ** -0.5
        elif name == "weight":
            values += 1
        found[name] = nn.Parameter(values.to(dtype)) if name in parameters else values.to(dtype).requires_grad_()
    return found


def empty_operands(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, device: str) -> Operands:
    """Tensors without values that want gradients."""
    return {name: torch.empty(shape, dtype=dtype, device=device).requires_grad_() for name, shape in shapes.items()}


def calls_of(function: str, twin: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """A function and its eager twin as `Block` and `Pair` have them. Parameters of the twin are the operands and, where
    they are keyword-only, options of both; its docstring is the formula."""
    ours = getattr(functional, function)
    parameters = tuple(inspect.signature(ours).parameters)
    weight = "norm_weight" if "norm_weight" in parameters else "weight"
    own = inspect.signature(twin).parameters.values()
    options = {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY} | dict(given)

    def call(**operands: Any) -> tuple[Tensor, ...]:
        if "normalized_shape" in parameters:
            operands["normalized_shape"] = operands[weight].shape
        if "num_groups" in parameters:
            operands["num_groups"] = groups_of(operands["input"].shape[1])
        if "rotary_dim" in parameters:
            operands["rotary_dim"] = 2 * operands["cos"].shape[-1]
        return as_tuple(ours(**operands, **options))

    def eager(**operands: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(twin(**operands, **options))

    return {"function": function, "formula": twin.__doc__, "options": options, "call": call, "eager": eager}


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def groups_of(channels: int) -> int:
    """32, as most networks have, or what there is for fewer channels."""
    return next(groups for groups in (32, 2, 1) if channels % groups == 0)


def block(function: str, by: Callable[..., dict[str, Any]] = lambda **options: {}, **declared: Any) -> Callable:
    """Makes of an eager twin what makes blocks, of a name and options; `by` tells what of a block depends on these."""

    def of(twin: Callable) -> Callable[..., Block]:
        def make(name: str, **given: Any) -> Block:
            calls = calls_of(function, twin, given)
            return Block(name, **calls, **declared, **by(**calls["options"]))

        return make

    return of
