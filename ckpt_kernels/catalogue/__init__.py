"""Describes each block once, for contract tests, benchmarks, `inspect` and the tables in README and docs.

`block` defines the description of a block, `blocks` lists the functions that compute a block, and `linear` the
functions that compute a block together with linear layers. The catalogue is part of the package because the contract
tests, those of `inspect` included, also run against an installed wheel.
"""
