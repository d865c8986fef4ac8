"""Texts with the target's features, kept to train the drafter on."""
