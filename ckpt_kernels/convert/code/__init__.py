"""Static analysis of a model's own code: call graph, reachability, in-place writes, liveness, evaluation order.

These modules read code and never run it. `source` finds the `def` of a function and checks that the `def` compiles
to the code that runs.
"""
