"""Notebooks to be read, run and changed; `python -m notebooks` executes them."""
