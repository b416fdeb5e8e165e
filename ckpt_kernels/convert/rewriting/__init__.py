"""Methods in which our calls stand in the place of what they compute.

`patterns` finds places in a method by `templates`, `rewrite` makes the method anew, and at each call `guards` asks of
the modules and tensors at a place what `sites` has to know; where one is not as expected, what was written runs.
"""
