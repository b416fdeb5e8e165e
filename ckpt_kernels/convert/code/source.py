"""The source of functions: finds the `def` of a function, and recompiles a function from a changed `def`.

A `def` is accepted only if it compiles to the code that runs. A recompiled function keeps the globals, closure,
defaults, attributes and decorators, and the file and line numbers by which tracebacks and breakpoints work. `NoSource`
is raised where this is impossible.
"""

import __future__

import ast
import copy
import functools
import linecache
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .code_objects import cell_value
from .excerpts import excerpt_of, imported_names, likely_enclosing
from .memoization import memoized

_FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
# The largest depth of a syntax tree. A sum of 60 terms nests 60 deep, and so does a chain of 60 `elif`.
_MAX_DEPTH = 100


class NoSource(Exception):
    """The reason, for people, why a function has no usable source."""


class Definition(NamedTuple):
    """The `def` of a function, with all that is needed to compile the `def`: the enclosing classes and functions,
    outermost first, and the imports of the file. The trees are shared between callers and must not be changed."""

    tree: ast.FunctionDef
    enclosing: tuple[ast.stmt, ...]
    imports: tuple[ast.stmt, ...]


# The trees of functions that are in no file.
_trees: "weakref.WeakKeyDictionary[types.FunctionType, ast.FunctionDef]" = weakref.WeakKeyDictionary()


def set_tree(function: types.FunctionType, tree: ast.FunctionDef) -> None:
    """Gives a function that was compiled from a tree, and is in no file, the tree for its source."""
    _trees[function] = tree


def tree_of(function: types.FunctionType) -> ast.FunctionDef | None:
    """The `def` of a function, None without a usable source. The tree must not be changed."""
    try:
        return definition_of(function).tree
    except NoSource:
        return None


@memoized
def definition_of(function: types.FunctionType) -> Definition:
    """The `def` of a function, which compiles to the function's code. Raises `NoSource`."""
    if function in _trees:
        return Definition(_trees[function], (), ())
    code = function.__code__
    try:
        lines = linecache.getlines(code.co_filename, function.__globals__)
    except Exception as error:  # a custom loader may raise anything
        raise NoSource(f"its source cannot be read ({type(error).__name__})") from error
    if not lines:
        raise NoSource("its source is not there")
    text = "".join(lines)
    # User code may set the `__qualname__` of a function, but not that of a code object.
    name = getattr(code, "co_qualname", function.__qualname__)
    definition = _from_excerpt(excerpt_of(code, lines), name, imported_names(code, text), code, code.co_filename)
    return definition or _from_file(text, code, code.co_filename)


# The last argument is the file name: code objects of two files may be equal.
@functools.lru_cache(maxsize=4096)
def _from_excerpt(
    excerpt: str, qualified_name: str, imported: tuple[str, ...], code: types.CodeType, _: str
) -> Definition | None:
    """The definition from the function's own lines; None if they do not compile to the same code."""
    try:
        tree = _find(ast.parse(excerpt), code)[1]
        if not _is_shallow(tree):
            return None
        imports = tuple(ast.Import([ast.alias(name)]) for name in imported)
        definition = Definition(tree, likely_enclosing(qualified_name), imports)
        return definition if _compiled(definition, code, ()) == code else None
    except (SyntaxError, ValueError, RecursionError, NoSource):
        return None


@functools.lru_cache(maxsize=4096)
def _from_file(text: str, code: types.CodeType, _: str) -> Definition:
    """The definition from the whole file."""
    file = _parsed(text)
    enclosing, tree = _find(file, code)
    if not _is_shallow(tree):
        raise NoSource("its expressions or statements nest too deep")
    definition = Definition(tree, enclosing, _imports(file))
    if _compiled(definition, code, ()) != code:
        raise NoSource("its source has changed since it was imported")
    return definition


def rebuilt(function: types.FunctionType, definition: Definition, cells: Mapping[str, Any]) -> types.FunctionType:
    """The function recompiled from the definition's tree, with the names of `cells` as additional closure variables."""
    code = _compiled(definition, function.__code__, tuple(cells))
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure |= {name: types.CellType(value) for name, value in cells.items()}
    return _copy(function, code, [closure[name] for name in code.co_freevars])


def decorator_chain(method: types.FunctionType) -> list[types.FunctionType]:
    """A method and the functions that its decorators wrap, outermost first; the last one is undecorated."""
    chain = [method]
    while (inner := vars(chain[-1]).get("__wrapped__")) is not None:
        cells = [cell for cell in chain[-1].__closure__ or () if cell_value(cell) is inner]
        if not isinstance(inner, types.FunctionType) or len(cells) != 1:
            raise NoSource("a decorator keeps the function where it cannot be exchanged")
        chain.append(inner)
    return chain


def redecorated(chain: Sequence[types.FunctionType], inner: types.FunctionType) -> types.FunctionType:
    """Copies of the wrappers in a `decorator_chain`, with `inner` innermost; no decorator runs again."""
    wrapped = chain[-1]
    for wrapper in reversed(chain[:-1]):
        closure = [types.CellType(inner) if cell_value(cell) is wrapped else cell for cell in wrapper.__closure__ or ()]
        wrapped, wraps = wrapper, inner
        inner = _copy(wrapper, wrapper.__code__, closure)
        inner.__dict__["__wrapped__"] = wraps
    return inner


def _copy(function: types.FunctionType, code: types.CodeType, closure: Sequence[types.CellType]) -> types.FunctionType:
    """A copy of a function with other code and another closure."""
    copied = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(closure))
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__annotations__ = function.__annotations__
    copied.__dict__.update(function.__dict__)
    copied.__doc__, copied.__module__ = function.__doc__, function.__module__
    copied.__qualname__ = function.__qualname__
    return copied


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise NoSource("its source cannot be parsed") from error


def _is_shallow(tree: ast.AST) -> bool:
    """Whether a tree is shallow enough for recursive walks, which run out of stack in deep ones."""
    level, depth = [tree], 0
    while level and depth <= _MAX_DEPTH:
        level, depth = [child for node in level for child in ast.iter_child_nodes(node)], depth + 1
    return not level


def _find(tree: ast.AST, code: types.CodeType) -> tuple[tuple[ast.stmt, ...], ast.FunctionDef]:
    """The `def` with the name and first line of the code, and the classes and functions around the `def`."""
    waiting: list[tuple[tuple[ast.stmt, ...], ast.AST]] = [((), tree)]
    while waiting:
        enclosing, node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name and _first_line(node) == code.co_firstlineno:
            return enclosing, node
        inner = (*enclosing, node) if isinstance(node, _DEFINITIONS) else enclosing
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
    """The imports outside definitions: Python compiles `torch.f(x)` differently if the file imports `torch` there."""
    return tuple(node for node in _outside_definitions(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def _outside_definitions(node: ast.AST) -> list[ast.AST]:
    nodes = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*_DEFINITIONS, ast.AsyncFunctionDef, ast.expr)):
            nodes += [child, *_outside_definitions(child)]
    return nodes


def _compiled(definition: Definition, code: types.CodeType, cells: tuple[str, ...]) -> types.CodeType:
    """The code of the definition in the context of its file, with the names `cells` added to its closure."""
    body: list[Any] = [definition.tree]
    path = [code.co_name]
    outer = [name for name in code.co_freevars if name != "__class__"]
    for enclosing in reversed(definition.enclosing):
        node: Any = copy.copy(enclosing)
        if isinstance(node, ast.ClassDef):
            node.bases, node.keywords = [], []
        else:
            body, outer = [*_assignments(outer), *body], []
        node.body, node.decorator_list = body, []
        path.append(node.name)
        body = [node]
    if cells:
        maker: Any = ast.parse("def maker(): pass").body[0]
        # A name that is global in the file stays global here.
        maker.body = [ast.Global([body[-1].name]), *_assignments(cells), *body]
        path.append(maker.name)
        body = [maker]
    module = ast.fix_missing_locations(ast.Module([*definition.imports, *body], []))
    try:
        compiled = compile(module, code.co_filename, "exec", code.co_flags & _FUTURE, dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise NoSource("its source does not compile by itself") from error
    for name in reversed(path):
        inner = [c for c in compiled.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
        if len(inner) != 1:
            raise NoSource("its source does not compile to one function")
        compiled = inner[0]
    return compiled


def _assignments(names: Sequence[str]) -> list[ast.stmt]:
    """Statements that make local variables of these names."""
    return ast.parse("".join(f"{name} = None\n" for name in names)).body
