"""The blocks, each described once, for contract tests, benchmarks, `inspect` and the tables in README and docs.

`block` says what a block is here; `blocks` has the functions that compute one, `linear` those that compute one with the
linear layers beside it. The catalogue is part of the package because the contract tests run beside an installed wheel,
and the tests of `inspect` among them.
"""
