"""Functions that treat tensors of every size as they treat small ones, by their source."""

import importlib.util
import pathlib
import textwrap
from types import FunctionType

import pytest

from ckpt_kernels.convert.code.size_independence import is_size_independent

INDEPENDENT = {
    "halves": "return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)",
    "every second element": "return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)",
    "a length with a name": "n = y.size(-1)\nreturn torch.cat((x[..., :n] * y, x[..., n:], x[:, :, :, -n:]), -1)",
    "views": "return x.view(*x.shape[:-1], 2, x.shape[-1] // 2).reshape(x.shape)",
    "settings": "if dim == 1:\n    x = x + 1\nif not flag:\n    x = -x\nif dim is None:\n    raise KeyError\nreturn x",
    "unpacked tensors": "real, imaginary = x.chunk(2, -1)\nfirst, *none, last = real, imaginary\nreturn first * last",
}
DEPENDENT = {
    # Shapes of more dimensions than trials have.
    "x.reshape(*x.shape[:5])": "return x.reshape(*x.shape[:5])",
    # Slices by numbers, by other lengths, of other dimensions, or of other steps.
    "x[..., :4]": "return x[..., :4]",
    "x[..., ::3]": "return x[..., ::3]",
    "x[..., 2::2]": "return x[..., 2::2]",
    "x[..., :8:2]": "return x[..., :8:2]",
    "x[..., n // 2 : 4]": "return x[..., x.shape[-1] // 2 : 4]",
    "x[..., : n // 2 // 2]": "return x[..., : x.shape[-1] // 2 // 2]",
    "x[..., : x.shape[-2]]": "return x[..., : x.shape[-2]]",
    "x[..., : x.size(0)]": "return x[..., : x.size(0)]",
    "x[..., : x.size(+1)]": "return x[..., : x.size(+1)]",
    "x[..., : ~x.size(-1)]": "return x[..., : ~x.size(-1)]",
    "x[:, :n]": "return x[:, : x.shape[-1]]",
    "x[:, None, :, :n]": "return x[:, None, :, : x.shape[-1]]",
    "x[0, ..., :n]": "return x[0, ..., : x.shape[-1]]",
    # Sizes as numbers.
    "x * n": "return x * x.shape[-1]",
    "x.view(-1, n - 4)": "return x.view(-1, x.shape[-1] - 4)",
    "x.repeat(1, n)": "return x.repeat(1, x.shape[-1])",
    "rows, n = x.shape": "rows, n = x.shape\nreturn x * n",
    # Names that may stand for something else than a length, or for a size where a tensor is read.
    "a length or a number": "n = x.shape[-1]\nif flag:\n    n = 4\nreturn x[..., :n]",
    "a length or an argument": "if flag:\n    dim = x.shape[-1]\nreturn x[..., :dim]",
    "a length or an argument of a lambda": "n = x.shape[-1]\nreturn (lambda n: x[..., :n])(4)",
    "a size or a tensor": "n = x.shape[-1]\nn, other = y\nreturn x * n",
    # Branches by other values than arguments.
    "flag = len(x)": "flag = len(x)\nif flag:\n    x = -x\nreturn x",
    "(flag := len(x))": "(flag := len(x))\nif flag:\n    x = -x\nreturn x",
    "if x < 3": "if x < 3:\n    return -x\nreturn x",
    "first, *flag = x": "first, *flag = x\nif flag:\n    return first\nreturn y",
    "if dim == len(x)": "if dim == len(x):\n    x = -x\nreturn x",
    "if dim == 1 < len(x)": "if dim == 1 < len(x):\n    x = -x\nreturn x",
    "len(x) > 3": "return x * (len(x) > 3)",
    "len(x) and x": "return len(x) and x",
    "x if len(x) else y": "return x if len(x) else y",
    # Loops.
    "for row in x": "for row in x:\n    y = y + row\nreturn y",
    "rows of x": "return torch.stack([row for row in x])",
    "yield x": "yield x",
    # Operators that our functions do not compute.
    "x @ y": "return x @ y",
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FunctionType]:
    """The functions with these bodies, imported from a file."""
    bodies = INDEPENDENT | DEPENDENT
    path: pathlib.Path = tmp_path_factory.mktemp("functions") / "bodies.py"
    heads = (f"def function{number}(x, y, flag, *, dim=None):\n" for number in range(len(bodies)))
    defined = (head + textwrap.indent(body, "    ") for head, body in zip(heads, bodies.values(), strict=True))
    path.write_text("\n\n".join(("import torch", *defined)))
    spec = importlib.util.spec_from_file_location("bodies", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: getattr(module, f"function{number}") for number, name in enumerate(bodies)}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_functions_of_every_size(name: str, functions: dict[str, FunctionType]) -> None:
    assert is_size_independent(functions[name])


@pytest.mark.parametrize("name", DEPENDENT)
def test_functions_that_may_treat_large_tensors_otherwise(name: str, functions: dict[str, FunctionType]) -> None:
    assert not is_size_independent(functions[name])
