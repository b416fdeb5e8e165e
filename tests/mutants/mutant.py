"""A mutant: a fault in a source file, and the tests that must fail with the fault.

The text `find` must occur once in the file; «» marks the replaced part of the text, if that is not all. In C++ and CUDA
sources the replaced part is an expression, or a statement with the semicolon, because original and replacement are both
compiled.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault: the text and the replacement, the pytest arguments of the tests that must fail, and the reason if no
    test can fail."""

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
        """Whether the fault is compiled into the library. The tests compile the CUDA kernels themselves."""
        return self.is_compiled and not self.file.startswith("csrc/cuda/")

    def parts(self, text: str) -> tuple[str, str, str]:
        """The text before the fault, the replaced text, and the text after the fault."""
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
        """The file with the original and the fault, which runs where `ckpt_mutant` has this number."""
        before, original, after = self.parts(text)
        if original.endswith(";"):
            both = f"{{ if (ckpt_mutant == {number}) {{ {self.replace} }} else {{ {original} }} }}"
        else:
            both = f"(ckpt_mutant == {number} ? ({self.replace}) : ({original}))"
        return before + both + after
