"""Rotary settings: in either form or both, out again, and what is refused."""

import math

import pytest

from tlt_jax.models.config import RopeScaling
from tlt_jax.models.formats import hf_rope

LLAMA3 = RopeScaling("llama3", 8.0, 16, low_freq_factor=2.0, high_freq_factor=3.0)
YARN = RopeScaling("yarn", 4.0, 16, beta_fast=30.0, beta_slow=2.0, truncate=False)


def test_theta_stands_in_one_place_or_in_both():
    assert hf_rope.from_hf({}, 64) == (10_000.0, None)
    assert hf_rope.from_hf({"rope_theta": 500}, 64) == (500.0, None)
    both = {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 500.0}}
    assert hf_rope.from_hf(both, 64) == (500.0, None)
    with pytest.raises(ValueError, match="rope_theta=400.0 contradicts .*=500.0"):
        hf_rope.from_hf(both | {"rope_theta": 400.0}, 64)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 3.0),
        LLAMA3,
        YARN,
        RopeScaling("yarn", 4.0, 16, attention_factor=1.5),
    ],
)
def test_what_is_written_reads_the_same_in_both_forms(scaling):
    entries = hf_rope.to_hf(scaling)
    for form in ("rope_scaling", "rope_parameters"):
        assert hf_rope.from_hf({form: entries}, 64) == (10_000.0, scaling)
    both = {"rope_scaling": entries, "rope_parameters": entries}
    assert hf_rope.from_hf(both, 64) == (10_000.0, scaling)


def test_mscale_is_a_factor_on_cos_and_sin():
    def factor(**settings):
        given = {"rope_type": "yarn", "factor": 16.0} | settings
        return hf_rope.from_hf({"rope_scaling": given}, 64)[1].attention_factor

    log = 0.1 * math.log(16)
    wanted = (0.5 * log + 1) / (2 * log + 1)
    assert factor(mscale=0.5, mscale_all_dim=2.0) == pytest.approx(wanted)
    assert factor() is None
    # The factor itself goes before what it would be made of.
    assert factor(mscale=0.5, mscale_all_dim=2.0, attention_factor=1.25) == 1.25
    assert factor(mscale=0.5, mscale_all_dim=2.0, factor=1.0) == 1.0
    with pytest.raises(ValueError, match="mscale=0.5 and mscale_all_dim=None"):
        factor(mscale=0.5)


def test_what_is_not_computed_is_refused_by_name():
    def refused(message, **entries):
        with pytest.raises(ValueError, match=message):
            hf_rope.from_hf({"rope_scaling": entries}, 64)

    refused("rope_type='dynamic' is not supported", rope_type="dynamic", factor=2.0)
    refused(
        "type='yarn' contradicts rope_type='linear'", type="yarn", rope_type="linear"
    )
    refused("partial_rotary_factor=0.5", partial_rotary_factor=0.5)
    refused("unsupported keys: beta_fast", type="linear", factor=2.0, beta_fast=3)
    refused("factor=-1", type="linear", factor=-1)
