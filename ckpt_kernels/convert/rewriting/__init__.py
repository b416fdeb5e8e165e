"""Rewriting of methods: replaces expressions in a user's method by fused calls.

`matching` finds call sites by `templates`, `rewrite` recompiles the method, and at each call `guards` check the modules
and tensors at a site for `fused_patterns`; where a check fails, the original expression runs.
"""
