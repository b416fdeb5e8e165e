"""Recognises norms, activations, dropouts and gates, by their class or by trials, and computes them by fused functions.

A `Rule` (`rule`) replaces the methods of one class of module; `trial` runs stand-ins of modules to learn the function
that they compute.
"""
