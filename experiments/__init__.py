"""Measurements: one module per figure or table, with the harness they share."""
