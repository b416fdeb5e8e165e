"""What modules compute: norms, activations, dropouts and gates, known by their class or by trying them out.

A `Rule` (`rule`) says what a converted module computes in the place of its own forward; `trial` runs stand-ins.
"""
