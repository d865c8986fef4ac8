"""What the experiments share: harness, tables, plots, provenance."""
