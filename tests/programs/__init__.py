"""Generated programs: a model and its converted twin are called alike, and must not be told apart.

`grammar` writes the source of a model and what happens between its calls, from a seed and the fragments in `templates`
and `actions`; `library` is the text that every source begins with. `runner` imports a source twice and runs the twins;
`comparer` says in what they differ. `python -m tests.programs` runs as many as one likes, and shrinks what fails.
"""

from .grammar import Program, write
from .runner import Result, run

__all__ = ["Program", "Result", "run", "write"]
