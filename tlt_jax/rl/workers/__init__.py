"""Rollout workers side by side, and their coordinator."""
