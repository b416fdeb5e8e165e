"""Small faults, put into the sources one at a time, that the tests are to notice. `make mutants` runs them.

What the tests do not notice is a hole in them, or a fault that makes no difference. The table (`table.py`) says of each
fault which tests are to notice it, or why none can.
"""
