"""Processes, devices, programs and clocks: what a run stands on."""
