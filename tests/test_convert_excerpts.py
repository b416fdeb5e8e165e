"""Definitions that are parsed from an excerpt of the file equal those parsed from the whole file."""

import ast
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ckpt_kernels
from ckpt_kernels.convert.code import source
from ckpt_kernels.convert.code.excerpts import excerpt_of
from ckpt_kernels.convert.code.source import decorator_chain, definition_of

try:
    import torch.nn.functional as functions
except ImportError:  # which makes it an import all the same
    functions = None


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__own = 1

    @decorated
    def has_decorators(self, x: Any) -> Any:
        return torch.relu(x) + functions.relu(x)

    def has_private_names(self) -> Any:
        return self.__own, super().training

    def one_line(self) -> int: return 1  # fmt: skip

    def has_comments(self, x: Any) -> Any:
        y = torch.relu(
            x
# which stands where a statement would end the function
        )  # fmt: skip
        return [
            y
        ]  # fmt: skip

    def has_text(self) -> str:
        text = """
of lines that begin where a class would
"""
        return text

    def has_functions(self, x: Any) -> Any:
        def inner(y: Any) -> Any:
            return [x, y, *(lambda z: [z for _ in range(2)])(y)]

        return inner

    class Inner:
        @staticmethod
        def method(x: Any) -> Any:
            return isinstance(x, ast.Module) and inspect.isclass(x)

    def ends_in_text(self) -> str:
        return """
of lines that begin where a class would
"""


def nested(x: Any) -> Callable[[], Any]:
    class Local:
        def method(self) -> Any:
            return x, __class__  # type: ignore[name-defined]

    return Local.method


def without_code() -> None:
    """A function that compiles to no instructions but a return."""


METHODS = [value for value in vars(Kinds).values() if isinstance(value, types.FunctionType)]
FUNCTIONS = [*METHODS, Kinds.has_functions(None, 1), Kinds.Inner.method, nested(1), nested, without_code]  # type: ignore[arg-type]
TORCHS = [nn.Linear.forward, nn.MultiheadAttention.forward, nn.Module._call_impl, nn.functional.cross_entropy]


@pytest.mark.parametrize("function", [*FUNCTIONS, *TORCHS], ids=lambda function: function.__qualname__)
def test_excerpts_give_the_definitions_of_the_whole_file(function: types.FunctionType) -> None:
    function = decorator_chain(function)[-1]
    code = function.__code__
    with open(code.co_filename) as file:
        whole = source._from_file(file.read(), code, code.co_filename)
    found = definition_of(function)
    assert ast.dump(found.tree, include_attributes=True) == ast.dump(whole.tree, include_attributes=True)
    assert [type(node) for node in found.enclosing] == [type(node) for node in whole.enclosing]
    assert found is not whole or function is Kinds.ends_in_text


@pytest.mark.parametrize("instead", ["", "def fits(x):\n    return x\n", "def fits(x):\n    return x +\n", "x = 1\n"])
def test_an_excerpt_with_other_code_is_not_used(instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = nn.Linear.forward
    expected = ast.dump(definition_of(function).tree)
    before = "\n" * (function.__code__.co_firstlineno - 1)
    monkeypatch.setattr(source, "excerpt_of", lambda *_: before + instead.replace("fits", "forward"))
    assert ast.dump(definition_of(function).tree) == expected


def test_missing_lines_give_no_excerpt() -> None:
    code = nn.Linear.forward.__code__
    assert excerpt_of(code, []) == "" and excerpt_of(code, ["\n"] * code.co_firstlineno) == ""


DEEP = """
class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.norm(x)
        return self.last({sum})
"""


@pytest.mark.parametrize("terms", [50, 400])
def test_deeply_nested_expressions(terms: int, tmp_path: Any) -> None:
    file = tmp_path / "deep.py"
    file.write_text(DEEP.format(sum=" + ".join(["h"] * terms)))
    names = {"nn": nn}
    exec(compile(file.read_text(), str(file), "exec"), names)
    model: Any = names["Deep"]().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = model(x)
    for level in ("output", "layer"):
        ckpt_kernels.convert(model, recompute=level)
        torch.testing.assert_close(model(x), expected)


def test_a_loader_that_raises() -> None:
    class Loader:
        def get_source(self, name: str) -> str:
            raise KeyError(name)

    names = {"nn": nn, "__name__": "nowhere", "__loader__": Loader()}
    exec(compile(DEEP.format(sum="h"), "nowhere.py", "exec"), names)
    model: Any = names["Deep"]()
    assert ckpt_kernels.convert(model).replaced
    assert model(torch.randn(3, 4)).shape == (3, 4)
