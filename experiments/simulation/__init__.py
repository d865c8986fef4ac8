"""Discrete-event simulation of RL steps on a cluster."""
