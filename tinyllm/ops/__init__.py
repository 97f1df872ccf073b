"""Arithmetic with more than one implementation: a registry, a reference and native kernels."""
