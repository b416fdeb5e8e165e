"""The nodes that may have written in place to a tensor, read off the autograd graph.

A node does not show whether its op wrote the output over the operand. Counts of versions prove that: see
`Trace.is_written_by_graph`.
"""

from typing import Any, NamedTuple

from . import nodes
from .cells import Cell
from .entries import Block, Entry, block_of
from .nodes import Watched
from .rules import RULES, WRITERS

# The most in-place writes that a recipe repeats.
MOST_WRITES = 6


class Origin(NamedTuple):
    """A tensor as it was at a version, before `writers` wrote to it, the last of them first.

    The tensor is the output of a block, or a watched one, which has no `block`. `source` refers weakly to the tensor
    and its storage.
    """

    writers: list[Any]
    source: Entry | Watched
    version: int
    block: Block | None


def origin_of(node: Any, owner: Any) -> Origin | None:
    """The tensor that `node` and the nodes before it may have written to, following the first edge of each.

    `owner` is the context that a block's output must belong to.
    """
    writers: list[Any] = []
    output = 0
    while node is not None and len(writers) <= MOST_WRITES:
        block = own_block(node, owner)
        if block is not None:
            is_written = writers and output == 0
            return Origin(writers, block.entry, block.entry.version, block) if is_written else None
        watched = nodes.watched(node, output) if writers else None
        if watched is not None:
            return Origin(writers, watched, 0, None)
        # A view, or a tensor that shares the memory and has a version counter of its own, is no write.
        if output != 0 or nodes.name_of(node) not in WRITERS:
            return None
        writers.append(node)
        node, output = node.next_functions[0]
    return None


def own_block(node: Any, owner: Any) -> Block | None:
    """The `Block` on a node, if it belongs to the context `owner`."""
    block = block_of(node)
    return block if block is not None and block.owner is owner else None


def wrote_over_operand(node: Any, version: int) -> bool:
    """Whether a node wrote its output, now at `version`, over its operand, with no other write.

    If a node writes over a tensor that the gradient needs, torch saves a clone of the tensor. The node has no edge to
    the clone.
    """
    rule = RULES.get(nodes.name_of(node))
    if version != 1 or rule is None or rule.saved != ("self",):
        return False
    content = nodes.packed(node, "self")
    if not isinstance(content, Cell) or not content.is_clone:
        return False
    return nodes.name_of(node.next_functions[0][0]) != "CloneBackward0"
