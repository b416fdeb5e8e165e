"""Generated programs: a model and a converted twin take the same steps, and must give the same results.

`grammar` writes the source of a model and the steps, from a seed and the fragments in `templates`, `statements` and
`actions`; `library` is the text at the start of every source. `runner` imports a source twice and runs the twins;
`comparer` lists their differences. `python -m tests.programs` runs many programs, and `shrink` makes failing ones
smaller.
"""

from .grammar import Program, write
from .runner import Result, run

__all__ = ["Program", "Result", "run", "write"]
