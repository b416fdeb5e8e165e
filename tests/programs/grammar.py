"""Writes a program from a seed: the source of a model, and the steps that run."""

import random
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import actions, statements, templates
from .actions import Step

_PLACEHOLDER = re.compile(r"\$([A-Za-z]+\d*)")
_NAMES = ("h", "out", "z", "res", "hidden", "attn", "y", "state", "k", "x")
_SCRATCH = ("tmp", "a", "b", "c", "mixed", "part")
_LIBRARY = Path(__file__).with_name("library.py").read_text()


@dataclass(frozen=True)
class Program:
    """A model's source without the library's text, the shape of an argument after the rows, and the steps."""

    seed: int
    source: str
    shape: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        return f"{_LIBRARY}\n\n{self.source}"

    @property
    def coarse(self) -> bool:
        """Whether some of the program computes in bfloat16."""
        return "bfloat16" in self.source or any("bfloat16" in step.text or step.autocast for step in self.steps)

    def __str__(self) -> str:
        steps = "\n".join(f"# {step}" for step in self.steps)
        return (
            f"# seed {self.seed}, argument of shape (rows, {', '.join(map(str, self.shape))})\n{self.source}\n{steps}"
        )


@dataclass
class Slot:
    """The tensor of a name: `kept` if an op saves it for backward, so that a write would be an error."""

    kept: bool


@dataclass
class Class:
    """A class under construction, and the children of an instance by kind."""

    name: str
    rng: random.Random
    no_grad: bool
    blocks: "list[Class]"
    children: dict[str, str] = field(default_factory=dict)
    init: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    helpers: int = 0

    def child(self, kind: str) -> str:
        """An attribute with a child of this kind, usually a new one."""
        if kind == "block" and not self.blocks:
            kind = "mlp"
        old = [name for name, child_kind in self.children.items() if child_kind == kind]
        if old and self.rng.random() < 0.25:
            return f"self.{self.rng.choice(old)}"
        made = (
            f"{self.rng.choice(self.blocks).name}()" if kind == "block" else self.rng.choice(templates.CHILDREN[kind])
        )
        name = f"{kind}{len(self.children) + 1}"
        self.children[name] = kind
        self.init.append(f"        self.{name} = {made}")
        return f"self.{name}"

    def helper(self) -> str:
        """Adds a method of one tensor, and returns the text of a call."""
        decorator, parameters, call = self.rng.choice(statements.HELPERS)
        self.helpers += 1
        name = f"helper{self.helpers}"
        body = Body(self, {"t": Slot(True)}, depth=2, free="self" not in parameters)
        if not body.free:
            for _ in range(self.rng.randint(0, 2)):
                body.statement()
        body.lines.append(f"return {body.expression()}")
        head = [f"    {decorator}"] if decorator else []
        self.methods.append("\n".join([*head, f"    def {name}({parameters}):", *body.indented(8)]))
        return call.format(name)

    def paths(self, of: str) -> list[tuple[str, str]]:
        """Kinds and paths of all children, including the children of generated classes."""
        found = [(kind, f"{of}.{name}") for name, kind in self.children.items()]
        by_name = {block.name: block for block in self.blocks}
        for line in self.init:
            name, _, made = line.strip().removeprefix("self.").partition(" = ")
            if made.removesuffix("()") in by_name:
                found += by_name[made.removesuffix("()")].paths(f"{of}.{name}")
        return found

    def text(self, parameters: str, body: list[str]) -> str:
        lines = [f"class {self.name}(Base):", "    def __init__(self):", "        super().__init__()", *self.init, ""]
        for method in self.methods:
            lines += [method, ""]
        return "\n".join([*lines, f"    def forward(self, {parameters}):", *body, ""])


class Body:
    """Statements under construction. `names` are tensors of the argument's shape; a `free` body has no `self`."""

    def __init__(self, owner: Class, names: dict[str, Slot], depth: int = 0, free: bool = False) -> None:
        self.owner, self.names, self.depth, self.free = owner, names, depth, free
        self.rng = owner.rng
        self.lines: list[str] = []

    def indented(self, by: int) -> list[str]:
        return [" " * by + line if line else line for line in self.lines]

    def statement(self) -> None:
        tables = [statements.PATTERNS, statements.WRITES, statements.EFFECTS, statements.CONTROL]
        (table,) = self.rng.choices(tables, (8, 3, 2, 4 if self.depth < 2 else 0))
        self.write(self.rng.choice(table))

    def expression(self, table: tuple[str, ...] = templates.EXPRESSIONS, depth: int = 0) -> str:
        if self.free:
            table = tuple(t for t in table if "self." not in t and set(_PLACEHOLDER.findall(t)) <= set("xyzst"))
        template = self.rng.choice(table)
        return self.filled(template, nest=depth < 2 and table is templates.EXPRESSIONS, depth=depth)

    def write(self, template: str) -> None:
        """Appends the template's lines, and updates the names."""
        new = {key: self._new(key) for key in dict.fromkeys(_PLACEHOLDER.findall(template)) if key in "NMOnm"}
        while len(set(new.values())) < len(new):
            new = {key: self._new(key) for key in new}
        before = dict(self.names)
        for line in self.filled(template, new).split("\n"):
            self.lines.append(line)
        for key, name in new.items():
            self.names[name] = Slot(key in "NMO")
        # A tensor that a nested body assigned may be saved.
        for name, slot in before.items():
            if name in self.names and self.names[name] is not slot and name not in new.values():
                self.names[name] = Slot(True)

    def filled(self, template: str, new: dict[str, str] | None = None, nest: bool = False, depth: int = 0) -> str:
        """The template with a value for each placeholder."""
        values = dict(new or {})
        for key in dict.fromkeys(_PLACEHOLDER.findall(template)):
            if key in values:
                continue
            kind = key.rstrip("0123456789")
            once = template.count(f"${key}") == 1
            if nest and kind == "x" and once and self.rng.random() < 0.4:
                inner = self.expression(depth=depth + 1)
                values[key] = inner if inner.isidentifier() or template.endswith(f"(${key})") else f"({inner})"
            else:
                values[key] = self._value(kind)
        text = []
        for line in template.split("\n"):
            indent = line[: len(line) - len(line.lstrip())]
            filled = _PLACEHOLDER.sub(lambda match: values[match[1]], line.strip())
            text += [indent + part if part else part for part in filled.split("\n")]
        return "\n".join(text)

    def _value(self, kind: str) -> str:
        if kind in ("x", "y", "z", "s", "t"):
            recent = list(self.names)[-1] if self.rng.random() < 0.5 else self.rng.choice(list(self.names))
            self.names[recent].kept |= kind in "xyz"
            return recent
        if kind in ("w", "W"):
            return self._writable(kind == "W")
        if kind in ("u", "v", "q", "a"):
            return f"{self.rng.choice(_SCRATCH)}{self.rng.randint(1, 999)}"
        if kind in ("e", "smooth"):
            return self.expression(templates.EXPRESSIONS if kind == "e" else templates.SMOOTH)
        if kind == "cond":
            return self.filled(self.rng.choice(statements.CONDITIONS))
        if kind in ("body", "loop"):
            return self._nested(kind == "loop")
        return self.owner.helper() if kind == "helper" else self.owner.child(kind)

    def _writable(self, kept: bool) -> str:
        free = [name for name, slot in self.names.items() if self.owner.no_grad or not slot.kept]
        if not free:
            name = self._new("n")
            self.lines.append(self.filled(f"{name} = $lin($x)"))
            self.names[name] = Slot(False)
            free = [name]
        name = self.rng.choice(free)
        self.names[name].kept |= kept
        return name

    def _nested(self, loop: bool) -> str:
        # The next iteration of a loop reads a tensor again after a write.
        inner = {name: Slot(True) if loop else slot for name, slot in self.names.items()}
        body = Body(self.owner, inner, self.depth + 1, self.free)
        for _ in range(self.rng.randint(1, 3)):
            body.statement()
        for name in self.names:
            if loop or body.names[name] is not self.names[name]:
                self.names[name] = Slot(True)
        return "\n".join(body.indented(4))

    def _new(self, key: str) -> str:
        if self.rng.random() < 0.3:
            return self.rng.choice(list(self.names))
        return self.rng.choice(_NAMES)


def write(seed: int) -> Program:
    """The program of this seed."""
    rng = random.Random(seed)
    shape = (8,) if rng.random() < 0.25 else (8, 8)
    # A batch norm of two numbers returns plus and minus one, with gradients of rounding errors only.
    rows = (2, 3, 3, 4, 5) if len(shape) > 1 else (5, 6, 7, 9)
    no_grad = rng.random() < 0.2
    classes: list[Class] = []
    texts = []
    for name in [*(f"Block{i}" for i in range(rng.randint(0, 2))), "Model"]:
        whole = name == "Model"
        one = Class(name, rng, no_grad, list(classes))
        parameters, opening = rng.choice(templates.SIGNATURES if whole else templates.SIGNATURES[:5])
        argument = Slot(not whole)
        body = Body(one, {"x": argument, "y": argument})
        body.lines += opening
        for _ in range(rng.randint(2, 7) if whole else rng.randint(1, 4)):
            body.statement()
        if rng.random() < 0.5:
            body.write(f"$O = {' + '.join(body.names)}")
        body.write(rng.choice(templates.RETURNS if whole else templates.RETURNS[:3]))
        texts.append(one.text(parameters, body.indented(8)))
        classes.append(one)
        if whole:
            steps = actions.steps(rng, parameters, one.paths("model"), no_grad, rows)
    source = "\n\n".join(texts)
    if "checkpoint(" in source or any("checkpoint(" in step.text for step in steps):
        # As documented, the recomputation of a checkpoint gets plain tensors in place of a subclass.
        steps = tuple(replace(step, tagged=False) for step in steps)
    if "rand" in source:
        # The recomputation of a checkpoint draws other numbers from generators that torch does not restore.
        source = source.replace("checkpoint(", "called(")
        steps = tuple(replace(step, text=step.text.replace("checkpoint(", "called(")) for step in steps)
    return Program(seed, source, shape, steps)
