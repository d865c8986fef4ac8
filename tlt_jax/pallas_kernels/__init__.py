"""Kernels for accelerators, a folder each."""
