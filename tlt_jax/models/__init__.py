"""Decoder language models as plain functions over pytrees of arrays."""
