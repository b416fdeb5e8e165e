"""The source of a function: its `def`, found in its file and held against the code that runs, and functions made anew
from a changed `def`.

A function keeps all that it had: globals, closure, defaults, attributes, decorators, and the lines and the file that
tracebacks and breakpoints go by. Whatever cannot be had in that way raises `NoSource`.
"""

import __future__

import ast
import copy
import functools
import linecache
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .excerpts import excerpt_of, imported_names, likely_enclosing

_FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
# A sum of 60 terms nests 60 deep, and so does a chain of as many `elif`.
_DEEPEST = 100


class NoSource(Exception):
    """Why a function's source cannot be had; for people."""


class Definition(NamedTuple):
    """A function's own `def`, and what it takes to compile it: the classes and functions around it, from the outermost,
    and the imports of its file. All who ask get the same trees, which nobody changes."""

    tree: ast.FunctionDef
    around: tuple[ast.stmt, ...]
    imports: tuple[ast.stmt, ...]


def definition_of(function: types.FunctionType) -> Definition:
    """The `def` that `function` was made from. What it compiles to is what the function runs."""
    code = function.__code__
    try:
        lines = linecache.getlines(code.co_filename, function.__globals__)
    except Exception as error:  # of a loader of somebody's own
        raise NoSource(f"its source cannot be read ({type(error).__name__})") from error
    if not lines:
        raise NoSource("its source is not there")
    text = "".join(lines)
    # Of functions anybody may set the name.
    name = getattr(code, "co_qualname", function.__qualname__)
    alone = _by_itself(excerpt_of(code, lines), name, imported_names(code, text), code, code.co_filename)
    return alone or _in_its_file(text, code, code.co_filename)


# Code of two files may be equal.
@functools.lru_cache(maxsize=4096)
def _by_itself(excerpt: str, name: str, imported: tuple[str, ...], code: types.CodeType, _: str) -> Definition | None:
    """The definition by its own lines; None where these compile to anything else than what runs."""
    try:
        tree = _find(ast.parse(excerpt), code)[1]
        if not _is_shallow(tree):
            return None
        definition = Definition(tree, likely_enclosing(name), tuple(ast.Import([ast.alias(each)]) for each in imported))
        return definition if _compiled(definition, code, ()) == code else None
    except (SyntaxError, ValueError, RecursionError, NoSource):
        return None


@functools.lru_cache(maxsize=4096)
def _in_its_file(text: str, code: types.CodeType, _: str) -> Definition:
    """The same by the whole file."""
    file = _parsed(text)
    around, tree = _find(file, code)
    if not _is_shallow(tree):
        raise NoSource("its expressions or statements nest too deep")
    definition = Definition(tree, around, _imports(file))
    if _compiled(definition, code, ()) != code:
        raise NoSource("its source has changed since it was imported")
    return definition


def rebuilt(function: types.FunctionType, definition: Definition, cells: Mapping[str, Any]) -> types.FunctionType:
    """`function` with the definition's tree, in which the names of `cells` stand for these values."""
    code = _compiled(definition, function.__code__, tuple(cells))
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure |= {name: types.CellType(value) for name, value in cells.items()}
    return _like(function, code, [closure[name] for name in code.co_freevars])


def decorator_chain(method: types.FunctionType) -> list[types.FunctionType]:
    """The method and, from the outside, what its decorators wrap; the last is the one that was written."""
    layers = [method]
    while (inner := vars(layers[-1]).get("__wrapped__")) is not None:
        held = [cell for cell in layers[-1].__closure__ or () if _content(cell) is inner]
        if not isinstance(inner, types.FunctionType) or len(held) != 1:
            raise NoSource("a decorator keeps the function where it cannot be exchanged")
        layers.append(inner)
    return layers


def redecorated(layers: Sequence[types.FunctionType], inner: types.FunctionType) -> types.FunctionType:
    """The decorators' wrappers, none of which runs again, with `inner` in the place of the last of `layers`."""
    wrapped = layers[-1]
    for wrapper in reversed(layers[:-1]):
        closure = [types.CellType(inner) if _content(cell) is wrapped else cell for cell in wrapper.__closure__ or ()]
        wrapped, wraps = wrapper, inner
        inner = _like(wrapper, wrapper.__code__, closure)
        inner.__dict__["__wrapped__"] = wraps
    return inner


def _like(function: types.FunctionType, code: types.CodeType, closure: Sequence[types.CellType]) -> types.FunctionType:
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(closure))
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = function.__annotations__
    made.__dict__.update(function.__dict__)
    made.__doc__, made.__module__, made.__qualname__ = function.__doc__, function.__module__, function.__qualname__
    return made


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise NoSource("its source cannot be parsed") from error


def _is_shallow(tree: ast.AST) -> bool:
    """Whether nothing in a definition nests so deep that walks over it, which call themselves, run out of stack."""
    level, depth = [tree], 0
    while level and depth <= _DEEPEST:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1
    return not level


def _find(tree: ast.AST, code: types.CodeType) -> tuple[tuple[ast.stmt, ...], ast.FunctionDef]:
    """The `def` of that name that begins in that line, and what is around it."""
    waiting: list[tuple[tuple[ast.stmt, ...], ast.AST]] = [((), tree)]
    while waiting:
        around, node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name and _first_line(node) == code.co_firstlineno:
            return around, node
        inner = (*around, node) if isinstance(node, _DEFINITIONS) else around
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.excepthandler) and _has_line(child, code.co_firstlineno):
                waiting.append((inner, child))
    raise NoSource("its definition is not in its file")


def _first_line(node: ast.stmt | ast.excepthandler) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def _has_line(node: ast.stmt | ast.excepthandler, line: int) -> bool:
    return _first_line(node) <= line <= (node.end_lineno or line)


@functools.lru_cache(maxsize=64)
def _imports(tree: ast.Module) -> tuple[ast.stmt, ...]:
    """Python compiles `torch.f(x)` in one way where `torch` is imported at the top of the file, and else in another."""
    return tuple(node for node in _outside_definitions(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def _outside_definitions(node: ast.AST) -> list[ast.AST]:
    found = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*_DEFINITIONS, ast.AsyncFunctionDef, ast.expr)):
            found += [child, *_outside_definitions(child)]
    return found


def _compiled(definition: Definition, code: types.CodeType, cells: tuple[str, ...]) -> types.CodeType:
    """The code of the definition, as it would be where it stands, with `cells` for names of its closure."""
    body: list[Any] = [definition.tree]
    path = [code.co_name]
    outer = [name for name in code.co_freevars if name != "__class__"]
    for around in reversed(definition.around):
        node: Any = copy.copy(around)
        if isinstance(node, ast.ClassDef):
            node.bases, node.keywords = [], []
        else:
            body, outer = [*_bound(outer), *body], []
        node.body, node.decorator_list = body, []
        path.append(node.name)
        body = [node]
    if cells:
        maker: Any = ast.parse("def maker(): pass").body[0]
        # What is global in its file stays global here.
        maker.body = [ast.Global([body[-1].name]), *_bound(cells), *body]
        path.append(maker.name)
        body = [maker]
    module = ast.fix_missing_locations(ast.Module([*definition.imports, *body], []))
    try:
        found = compile(module, code.co_filename, "exec", code.co_flags & _FUTURE, dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise NoSource("its source does not compile by itself") from error
    for name in reversed(path):
        inner = [c for c in found.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
        if len(inner) != 1:
            raise NoSource("its source does not compile to one function")
        found = inner[0]
    return found


def _bound(names: Sequence[str]) -> list[ast.stmt]:
    return ast.parse("".join(f"{name} = None\n" for name in names)).body
