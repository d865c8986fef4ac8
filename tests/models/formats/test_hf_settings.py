"""Entries of a config.json: what each kind takes, and what it refuses by its key."""

import math

import pytest

from tlt_jax.models.formats import hf_settings


def test_integers():
    settings = {"n": 7, "whole": 7.0, "null": None, "zero": 0}
    assert hf_settings.integer(settings, "n") == 7
    whole = hf_settings.integer(settings, "whole")
    assert whole == 7 and isinstance(whole, int)
    for absent in ("null", "nowhere"):
        assert hf_settings.integer(settings, absent, 5) == 5
    assert hf_settings.integer(settings, "zero", at_least=0) == 0
    for value in (0, -1, 7.5, "7", True, [7], math.inf):
        with pytest.raises(ValueError, match="n=.*an integer of 1 or more"):
            hf_settings.integer({"n": value}, "n")
    with pytest.raises(ValueError, match="n=None"):
        hf_settings.integer({}, "n")


def test_numbers_above_zero():
    value = hf_settings.positive({"x": 2}, "x")
    assert value == 2.0 and isinstance(value, float)
    assert hf_settings.positive({"x": None}, "x", 0.5) == 0.5
    for value in (0, -2.0, math.inf, math.nan, "2", True):
        with pytest.raises(ValueError, match="x=.*a number above zero"):
            hf_settings.positive({"x": value}, "x")


def test_truth_values():
    assert hf_settings.boolean({"b": True}, "b") is True
    assert hf_settings.boolean({"b": None}, "b") is False
    assert hf_settings.boolean({}, "b", True) is True
    for value in (0, 1, "true"):
        with pytest.raises(ValueError, match="b=.*true or false"):
            hf_settings.boolean({"b": value}, "b")
