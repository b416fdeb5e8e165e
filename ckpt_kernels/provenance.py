"""How a tensor was made, read from the autograd graph that was really built.

Each node of the graph says by its name which op it is the gradient of, and holds what that op's gradient needs: often
the op's own operands. So a tensor that a cheap op made can be made again, to the last bit, from tensors that its node
keeps in any case. A `Trace` finds out how, or finds nothing: what is not in the tables of `rules` is not made again.

An operand that its node did not save is looked for behind the node's edge, and an edge says which op made the operand
but not whether somebody wrote to it afterwards where autograd does not see it (under no_grad, through `detach()`). So
there has to be evidence that nobody did: a version counter that still stands where it stood.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from .autocast import is_autocast
from .recipes import Cell, Operand, Step
from .rules import ATTENTIONS, BY_RESULT, PRODUCTS, RULES, RULES_AND_PRODUCTS, VIEWS, Rule

# Past this many ops the tensor is kept, so that a look at the graph and what it finds stay short.
MOST_STEPS = 12
# Of a block's output, in place.
MOST_WRITES = 4

Edge = tuple[Any, int]
# Under which name a node holds what is noted of its operands: the number that stood for one, else None.
_NOTED = "ckpt_kernels"
_NUMBERS = (int, float)


def is_as_made(tensor: Tensor) -> bool:
    """Whether nobody has written to a tensor. (A parameter is asked about when it is read again.)"""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_inference()
    return plain and (tensor._version == 0 or tensor.is_leaf)


def note(node: Any, numbers: tuple[float | None, ...]) -> None:
    """That the operands of a node are as they were made."""
    node.metadata[_NOTED] = numbers


class Block(NamedTuple):
    """A block's output, as its node knows it: a recipe, and what tells whether the output has been written to."""

    owner: Any
    recipe: Callable[[], Any]
    output: Callable[[], Tensor | None]
    storage: Any
    version: int
    watch: Tensor | None

    def is_unwritten(self) -> bool:
        return self.watch is not None and self.watch._version == self.version


class Source(Protocol):
    """Who packs what nodes save, and shares it."""

    def share(self, known: Cell | Block) -> Operand | None: ...

    def pack(self, tensor: Tensor) -> Cell: ...

    def exchange(self, own: Cell, step: Step) -> None: ...

    def is_as_used(self, bias: nn.Parameter) -> bool: ...

    def held_at(self, node: Any, output: int) -> Operand | None: ...


class Trace:
    """One look at the graph behind a tensor.

    Where `temporaries` are trusted an operand that nothing keeps is made again by its node without evidence. Where
    `products` may run again matrix products count as cheap.
    """

    def __init__(self, source: Source, temporaries: bool = False, products: bool = False) -> None:
        self._source = source
        self._temporaries = temporaries
        self._rules = RULES_AND_PRODUCTS if products else RULES
        self._steps = 0
        # Whether a value is made of anything but copies of biases.
        self.is_grounded = False
        # What is known to be at an edge, and nodes whose output nobody wrote to but by the node that follows.
        self._known: dict[Edge, Cell | Block] = {}
        self._trusted: list[Any] = []

    def value(self, node: Any, output: int) -> Step | None:
        """How to make a node's output."""
        rule = self._rules.get(node.name())
        self._steps += 1
        if rule is None or output != 0 or self._steps > MOST_STEPS:
            return None
        edges = node.next_functions
        packed = _packed_operands(node, rule, edges)
        if len(edges) != len(packed):
            return None
        if rule.private or (rule.casts and _is_cast_by_autocast(edges[0][0])):
            self._trusted.append(edges[0][0])
        operands = []
        noted = node.metadata.get(_NOTED, ())
        numbers = noted if len(noted) == len(edges) else (None,) * len(edges)
        for edge, held, number in zip(edges, packed, numbers, strict=True):
            if isinstance(held, Cell) and not held.is_unwritten():
                return None
            operand = self._shared(held if held is not None else number)
            if held is None and number is None:
                operand = self._behind(edge, bool(noted))
            if operand is None:
                return None
            operands.append(operand)
        for held in () if rule.beside is None else _packed_beside(node, rule.beside):
            if held is None or held.owner is not self._source or not held.is_unwritten():
                return None
            operands.append(self._source.share(held))
        try:
            options = rule.options(node)
        except (AttributeError, RuntimeError):
            return None
        if rule.saved is None:
            return Step(lambda *given: rule.function(given[: len(edges)], *given[len(edges) :]), operands, options)
        return Step(rule.function, operands, options)

    def is_written_by_graph(self, node: Any, storage: int, version: int) -> bool:
        """Whether a tensor, now at this version, is what `node` wrote over its operand; or a block's output, which has
        been written to by `node` and those before it alone.

        As many writes as nodes: had one of these not been in place, the memory would be another's; had there been
        another write, there would be more writes than nodes.
        """
        if _wrote_over_operand(node, version):
            return True
        nodes, block = self._nodes_to_block(node)
        if block is None or block.storage.cdata != storage or block.storage.expired():
            return False
        if version - block.version != len(nodes):
            return False
        self._trusted += nodes
        self._known[nodes[-1].next_functions[0]] = block
        return True

    def _nodes_to_block(self, node: Any) -> tuple[list[Any], Block | None]:
        """The nodes by which, each by its first operand, one comes to a block's."""
        nodes: list[Any] = []
        output = 0
        while node is not None and len(nodes) <= MOST_WRITES:
            block = self._block(node)
            if block is not None:
                return nodes, block if nodes and output == 0 else None
            if output != 0 or node.name() not in RULES:
                break
            nodes.append(node)
            node, output = node.next_functions[0]
        return nodes, None

    def _block(self, node: Any) -> Block | None:
        if not isinstance(node, BackwardCFunction):
            return None
        block = getattr(node, "recomputed_block", None)
        return block if isinstance(block, Block) and block.owner is self._source else None

    def learn(self, node: Any) -> None:
        """What a node shows of its neighbours by saving several, where it did not write over the first."""
        rule = self._rules[node.name()]
        if rule.saved is None or len(rule.saved) < 2 or rule.saved[1] is None:
            return
        edges = node.next_functions
        packed = _packed_operands(node, rule, edges)
        cells = [(edge, held) for edge, held in zip(edges, packed, strict=False) if isinstance(held, Cell)]
        for edge, cell in cells:
            # At version 0 it is what its node made.
            if cell.version == 0 and cell.is_unwritten():
                self._known[edge] = cell
        for (maker, _), cell in cells:
            if len(cells) > 1 and maker is not None and saves_result(maker.name()):
                self._exchange_result(maker, cell)

    def _exchange_result(self, node: Any, cell: Cell) -> None:
        """In x * sigmoid(x) both nodes keep the sigmoid, and the product's keeps x, from which it can be made."""
        own = result_cell(node)
        if own is None or own.depth or own.version or cell.version or not own.is_unwritten():
            return
        step = self.value(node, 0)
        if step is not None:
            self._source.exchange(own, step)

    def _shared(self, held: Cell | Block | float | None) -> Operand | float | None:
        if held is None or isinstance(held, _NUMBERS):
            return held
        if isinstance(held, Cell) and held.owner is not self._source:
            return None
        self.is_grounded = True
        return self._source.share(held)

    def _behind(self, edge: Edge, is_as_made: bool = False) -> Operand | float | None:
        """What is at an edge, if it is there to be had and nobody wrote to it since its node made it."""
        node, output = edge
        if node is None:
            return None
        known = self._known.get(edge)
        if known is not None:
            return self._shared(known)
        held = self._source.held_at(node, output)
        if held is not None:
            self.is_grounded = True
            return held
        block = self._block(node)
        if block is not None:
            return self._shared(block) if output == 0 and block.is_unwritten() else None
        name = node.name()
        if name in BY_RESULT or (name in ATTENTIONS and output == 0):
            own = result_cell(node) if name in BY_RESULT else _packed(node, "output")
            if isinstance(own, Cell) and own.is_unwritten():
                return self._shared(own)
        if name == "torch::autograd::AccumulateGrad":
            return self._copied(node.variable)
        if is_as_made or name in VIEWS or node in self._trusted or self._is_written_output(node):
            return self.value(node, output)
        # How a clone lies in memory is not known, and what reads it may go by that.
        return self.value(node, output) if self._temporaries and name != "CloneBackward0" else None

    def _is_written_output(self, node: Any) -> bool:
        """Whether the node's output is a block's, written to by this node and those before it alone."""
        block = self._nodes_to_block(node)[1]
        output = None if block is None else block.output()
        if block is None or output is None or output.grad_fn is not node:
            return False
        return self.is_written_by_graph(node, block.storage.cdata, output._version)

    def _copied(self, leaf: Tensor) -> Operand | None:
        """A bias: a copy of it costs nothing beside its rows, and neither an optimizer nor sharding changes it."""
        if not isinstance(leaf, nn.Parameter) or leaf.dim() > 1 or type(leaf.data) is not Tensor:
            return None
        if not self._source.is_as_used(leaf):
            return None
        return self._source.pack(leaf.detach().clone())


def _wrote_over_operand(node: Any, version: int) -> bool:
    """Whether a node's output, now at this version, has been written to by the node alone, over its operand.

    Where a node writes over what its gradient needs torch saves a clone of that, to which the node has no edge.
    """
    rule = RULES.get(node.name())
    if version != 1 or rule is None or rule.saved != ("self",):
        return False
    held = _packed(node, "self")
    return isinstance(held, Cell) and held.is_clone and node.next_functions[0][0].name() != "CloneBackward0"


def _is_cast_by_autocast(node: Any) -> bool:
    """Whether a node's output is what autocast makes of a parameter."""
    if node is None or node.name() != "ToCopyBackward0":
        return False
    maker = node.next_functions[0][0]
    is_of_leaf = maker is not None and maker.name() == "torch::autograd::AccumulateGrad"
    return is_of_leaf and is_autocast(maker.variable)


def _packed_operands(node: Any, rule: Rule, edges: Sequence[Edge]) -> list[Any]:
    if rule.saved is None:
        return [None] * len(edges)
    return [None if name is None else _packed(node, name) for name in rule.saved]


def result_cell(node: Any) -> Cell | None:
    """What a node that saves its result holds."""
    packed = _packed(node, "result")
    return packed if isinstance(packed, Cell) else None


def _packed(node: Any, name: str) -> Any:
    """What a node holds in the place of a tensor: a cell, a number that stood for a tensor, or None for all else."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        packed = saved.data
        if isinstance(packed, Cell):
            return packed
        # A Python number, of which torch makes a tensor that it does not give to hooks.
        if saved.unpack_hook is None and isinstance(packed, Tensor) and packed.dim() == 0 and packed.is_cpu:
            number = packed.item()
            return number if isinstance(number, _NUMBERS) and packed._version == 0 else None
    except (AttributeError, RuntimeError):
        # A torch that does not show this, or a graph whose tensors are freed.
        pass
    return None


def tensors_among(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """In tuples, lists and dicts, at most that deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict) and depth:
        for part in list(value.values()) if isinstance(value, dict) else value:
            yield from tensors_among(part, depth - 1)


def _packed_beside(node: Any, name: str) -> list[Cell | None]:
    """What a node holds that is no operand, with None for what it does not hold as a cell."""
    try:
        saved = getattr(node, f"_raw_saved_{name}")
        several = saved if isinstance(saved, tuple | list) else (saved,)
        return [s.data if s is not None and isinstance(s.data, Cell) else None for s in several]
    except (AttributeError, RuntimeError):
        return [None]


def is_made_cheaply(name: str, products: bool) -> bool:
    return name in RULES or (products and name in PRODUCTS)


def saves_result(name: str) -> bool:
    return name in BY_RESULT


def fills_memory(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor that fills its memory, so that something is gained when it goes."""
    return (
        tensor.dtype.is_floating_point
        and tensor.device.type in ("cpu", "cuda")
        and 0 < tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    )
