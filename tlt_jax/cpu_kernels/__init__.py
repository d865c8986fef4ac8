"""Kernels for CPUs, compiled when they are first used and called by XLA programs."""
