"""Attention of fresh queries over a paged cache and over the fresh keys they see."""
