"""Defines the description of a block, and the decorator that declares a block by its eager twin."""

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
    """The minimal memory traffic of one pass, in tensors of the block's shape."""

    read: int
    written: int


@dataclass(frozen=True)
class Block:
    """One public function with one choice of options.

    Attributes:
        name: the name of the block.
        function: the name of the public function.
        formula: the formula, for tables.
        options: the options of the function.
        call: the public function; takes the operands by name and returns a tuple of `outputs` tensors.
        eager: the same computation in eager torch, with the same arguments and results.
        rows: operands of the block's shape, or with twice the columns if `packed`.
        numbers: operands with one element.
        coefficients: vectors with an element for each column, or for each channel (dimension 1) if `channels`.
        samples: operands with a row for each index of the first dimension.
        tables: operands without a gradient, with a row for each index of the last dimension before the columns, and
            an entry for each pair of columns.
        packed: whether gate and value are packed in one operand.
        channels: whether the block is a channel norm.
        outputs: the number of outputs.
        kept: the tensors that may be kept for backward; "output 1" is the second output.
        statistics: the numbers kept beside these tensors, for an input of (samples, tokens or channels, ...).
        gradients: the number of tensors of the block's shape that the backward pass writes; None is one for each of
            `rows`.
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
        """Return random operands, which require gradients except for tables; `lead` has at least two dimensions."""
        operands = random_operands(self.shapes(lead, columns), self.parameters, dtype, device, seed)
        return operands | {name: operands[name].detach() for name in self.tables}

    def empty_operands(self, lead: Sequence[int], columns: int, dtype: torch.dtype, device: str) -> Operands:
        """Return operands without values, such as those on the meta device."""
        operands = empty_operands(self.shapes(lead, columns), dtype, device)
        return operands | {name: operands[name].detach() for name in self.tables}

    def shapes(self, lead: Sequence[int], columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each operand."""
        shapes = {name: (*lead, 2 * columns if self.packed else columns) for name in self.rows}
        shapes |= {name: (1,) for name in self.numbers}
        shapes |= {name: ((*lead, columns)[1 if self.channels else -1],) for name in self.coefficients}
        shapes |= {name: (lead[0], *[1] * (len(lead) - 1), columns) for name in self.samples}
        return shapes | {name: (*lead[-1:], columns // 2) for name in self.tables}

    @property
    def parameters(self) -> Sequence[str]:
        """The operands that are parameters of a module."""
        return (*self.numbers, *self.coefficients)

    @property
    def forward(self) -> Traffic:
        """The traffic of the forward pass. A channel norm reads the input a second time, after the statistics."""
        return Traffic(self._tensors(self.rows) + self.channels, self.outputs)

    @property
    def backward(self) -> Traffic:
        """The traffic of the backward pass, which reads kept tensors and incoming gradients; a channel norm, twice."""
        read = self._tensors(self.kept) + self.outputs
        written = self._tensors(self.rows) if self.gradients is None else self.gradients
        return Traffic(2 * read if self.channels else read, written)

    def _tensors(self, names: Sequence[str]) -> int:
        """Return the size of operands, in tensors of the block's shape."""
        return (2 if self.packed else 1) * len(set(names).difference(self.samples, self.tables))


def random_operands(
    shapes: Mapping[str, Sequence[int]], parameters: Collection[str], dtype: torch.dtype, device: str, seed: int
) -> Operands:
    """Return random tensors that require gradients.

    Weights of linear layers are scaled by the width, and weights of norms are around 1.
    """
    generator = torch.Generator(device).manual_seed(seed)
    operands = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        if name in parameters and len(shape) == 2:
            values *= shape[1] ** -0.5
        elif name == "weight":
            values += 1
        operands[name] = nn.Parameter(values.to(dtype)) if name in parameters else values.to(dtype).requires_grad_()
    return operands


def empty_operands(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, device: str) -> Operands:
    """Return tensors without values that require gradients."""
    return {name: torch.empty(shape, dtype=dtype, device=device).requires_grad_() for name, shape in shapes.items()}


def calls_of(function: str, twin: Callable, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Block` and `Pair` that follow from a public function and its eager twin.

    The twin's parameters are the operands; keyword-only parameters are options of both functions. The twin's docstring
    is the formula. `chosen` overrides the twin's defaults of options.
    """
    ours = getattr(functional, function)
    parameters = tuple(inspect.signature(ours).parameters)
    weight = "norm_weight" if "norm_weight" in parameters else "weight"
    own = inspect.signature(twin).parameters.values()
    options = {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY} | dict(chosen)

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
    """Return the number of groups of a group norm: 32, as in most networks, or 2 or 1 for fewer channels."""
    return next(groups for groups in (32, 2, 1) if channels % groups == 0)


def block(function: str, by: Callable[..., dict[str, Any]] = lambda **options: {}, **declared: Any) -> Callable:
    """Decorate an eager twin; the result makes a `Block` from a name and options.

    Args:
        function: the name of the public function.
        by: returns the fields of the block that depend on the options.
        declared: the other fields.
    """

    def decorate(twin: Callable) -> Callable[..., Block]:
        def make(name: str, **chosen: Any) -> Block:
            calls = calls_of(function, twin, chosen)
            return Block(name, **calls, **declared, **by(**calls["options"]))

        return make

    return decorate
