"""A fault, and which tests are to notice it.

In `find`, which must be in the file once, «» marks the replaced part where that is not all. Of C++ and CUDA sources
that is an expression, or a statement with its semicolon, because both it and its replacement are compiled.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault: what is replaced by what, the pytest arguments of the tests that are to fail by it, and, if none can,
    the reason."""

    name: str
    file: str
    find: str
    replace: str
    tests: str
    reason: str = ""

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def is_in_library(self) -> bool:
        """Of CUDA's kernels the tests have a build of their own."""
        return self.is_compiled and not self.file.startswith("csrc/cuda/")

    def parts(self, text: str) -> tuple[str, str, str]:
        """What is before the fault, what it replaces, and what comes after."""
        before, mark, rest = self.find.partition("«")
        original, _, after = rest.partition("»") if mark else (self.find, "", "")
        before = before if mark else ""
        whole = before + original + after
        if text.count(whole) != 1:
            raise ValueError(f"{self.file} has {text.count(whole)} times {whole!r}; expected it once")
        start = text.index(whole) + len(before)
        return text[:start], original, text[start + len(original) :]

    def applied(self, text: str) -> str:
        before, _, after = self.parts(text)
        return before + self.replace + after

    def switched(self, text: str, number: int) -> str:
        """The file with both, the fault where `ckpt_mutant` has its number."""
        before, original, after = self.parts(text)
        if original.endswith(";"):
            both = f"{{ if (ckpt_mutant == {number}) {{ {self.replace} }} else {{ {original} }} }}"
        else:
            both = f"(ckpt_mutant == {number} ? ({self.replace}) : ({original}))"
        return before + both + after
