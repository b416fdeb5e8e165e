"""`python -m benchmarks.rotations`: the architectures of transformers whose rotation of queries and keys, and whose
norms of queries and keys, `convert` recognises; with the reasons for the others."""

import ast
import functools
import importlib
import pathlib
import re
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

import ckpt_kernels
from ckpt_kernels.convert.code.scope import Scope
from ckpt_kernels.convert.code.source import NoSource, decorator_chain, definition_of
from ckpt_kernels.convert.rotations.recognition import rotation_of, why_not_rotation

_ROTATES = re.compile(r"^_*(\w+_)?apply_(\w+_)?(rotary|rope)")
# Norms of queries and keys, and not of the latent vectors from which latent attention computes them.
_NORMED = re.compile(r"^(q|k|qk|query|key)_?(layer)?_?(norm|layernorm|ln|layer_norm)s?$|^norm_[qk]$")
# The arguments of norms, for heads of 16.
_GIVEN: tuple[tuple[Any, ...], ...] = ((16,), ((4, 16),), (16, 4), (16, 1e-6), (4, 16), ())


class Call(NamedTuple):
    """A call that rotates heads, and the class of the caller.

    `why` is the reason why the function is not recognised, or "". `norms` has such a reason for each norm.
    """

    owner: str
    name: str
    why: str
    norms: dict[str, str]


def calls_in(module: types.ModuleType) -> Iterator[Call]:
    """The calls in the methods of a file's modules."""
    for node in ast.parse(pathlib.Path(module.__file__ or "").read_text()).body:
        owner = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
        if not (isinstance(owner, type) and issubclass(owner, nn.Module) and isinstance(node, ast.ClassDef)):
            continue
        methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        made = {name: kind for each in methods if each.name == "__init__" for name, kind in _norms_made(each)}
        for method in methods:
            calls = [each for each in ast.walk(method) if isinstance(each, ast.Call) and _ROTATES.search(_name(each))]
            if not calls:
                continue
            read = {each.attr for each in ast.walk(method) if isinstance(each, ast.Attribute)}
            norms = {name: _why_no_norm(module, kind) for name, kind in made.items() if name in read}
            for call in calls:
                yield Call(node.name, _name(call), _why_unknown(getattr(owner, method.name), call.func), norms)


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).split(".")[-1]


def _why_unknown(method: Any, called: ast.expr) -> str:
    try:
        function = decorator_chain(method)[-1]
        scope = Scope(function, definition_of(function).tree)
    except NoSource as error:
        return str(error)
    for value in (scope.value(called), scope.local_function(called)):
        if isinstance(value, types.FunctionType):
            return "" if rotation_of(value) is not None else why_not_rotation(value)
    return "is a method"


def _norms_made(init: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    for node in ast.walk(init):
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Attribute):
            calls = [each for each in ast.walk(node.value) if isinstance(each, ast.Call)]
            kinds = [ast.unparse(call.func) for call in calls if "orm" in ast.unparse(call.func)]
            if kinds and _NORMED.search(target.attr):
                yield target.attr, kinds[0]


@functools.cache
def _why_no_norm(module: types.ModuleType, kind: str) -> str:
    """The reason why a class of norms is not recognised; "" if the class, or a norm that it holds, is recognised."""
    found = getattr(nn, kind[3:]) if kind.startswith("nn.") else getattr(module, kind, None)
    for given in _GIVEN:
        try:
            norm = found(*given)
        except (TypeError, AttributeError):
            continue
        report = ckpt_kernels.convert(nn.Sequential(norm))
        return "" if report.replaced else "; ".join(entry.reason for entry in report.left_alone)
    return "cannot be made here"


def main() -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, list[Call]] = {}
    for path in sorted(pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if re.search("rotary|rope", path.read_text()):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            if calls := list(calls_in(module)):
                found.setdefault(path.parent.name, []).extend(calls)
    normed = {name: {k: v for c in calls for k, v in c.norms.items()} for name, calls in found.items()}
    normed = {name: norms for name, norms in normed.items() if norms}
    some = sum(any(not call.why for call in calls) for calls in found.values())
    every = sum(all(not call.why for call in calls) for calls in found.values())
    known = sum(not any(norms.values()) for norms in normed.values())
    print(f"# Rotations and norms of queries and keys, transformers {transformers.__version__}\n")
    print(f"By `python -m benchmarks.rotations`. Of {len(found)} architectures that rotate in a method of a module,")
    print(
        f"`convert` knows a function of {some}, and every one of {every}. {len(normed)} of these norm queries or keys"
    )
    print(f"beside; it knows these norms of {known}.\n")
    print("| architecture | class | what is not known | why |\n| --- | --- | --- | --- |")
    for name, calls in found.items():
        for owner, called, why in dict.fromkeys((c.owner, c.name, c.why) for c in calls if c.why):
            print(f"| {name} | {owner} | `{called}` | {why} |")
        for attribute, why in normed.get(name, {}).items():
            if why:
                print(f"| {name} | | `{attribute}` | {why} |")


if __name__ == "__main__":
    main()
