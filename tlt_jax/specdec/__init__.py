"""Decoding: position-keyed sampling, decode programs, speculation."""
