"""Reinforcement-learning post-training of LLMs with lossless adaptive speculation."""
