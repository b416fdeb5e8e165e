"""The blocks, each described once, for contract tests, benchmarks, `inspect` and the tables in README and docs.

`blocks` has the functions that compute one block, `linear` those that compute one with the linear layers beside it. The
catalogue is part of the package because `inspect` is, and because the contract tests run beside an installed wheel.
"""
