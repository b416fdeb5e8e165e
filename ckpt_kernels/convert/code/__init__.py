"""A model's own code as it is written: where it is found, what it reads, calls, reaches and writes to.

Code is read here and never run. `source` finds the `def` of a function and holds it against the code that runs.
"""
