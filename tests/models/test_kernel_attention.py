"""A kernel's part joins with others as the portable walk's does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.models import attention, kv_cache, transformer
from tlt_jax.pallas_kernels.verify_attention import api, arg_specs

SPEC = arg_specs.ArgSpec("joined", (31, 0), 5, num_kv=1, head_dim=16)
KERNEL = api.Implementation("triton_gpu", interpret=True)


def parts(visibility, kernel, arguments, window):
    """Attention over cache and fresh keys, alone and joined with more keys."""
    a = jax.tree.map(jnp.asarray, arguments)
    cache = kv_cache.PagedCache(a["cache_keys"], a["cache_values"])
    view = transformer.CacheView(cache, a["page_table"], a["lengths"])
    given = (a["query"], a["keys"], a["values"], a["positions"], visibility, view, 1)
    part = transformer.attend_parts(
        *given, window=window, kernel=kernel, with_log_normaliser=True
    )
    more = jax.random.normal(jax.random.key(0), (2, 2, 1, 16, 4))
    mask = jnp.ones((2, 5, 4), bool).at[0, 3].set(False)
    other = attention.attend_masked(a["query"], *more, mask, scale=SPEC.scale)
    return attention.finish(part), attention.finish(attention.join(other, part))


@pytest.mark.parametrize("seen", ["causal", "mask", "words"])
def test_parts_of_a_kernel_are_joined_as_others(seen):
    arguments = arg_specs.make(SPEC)
    # The portable walk reads the table's unused entries, too.
    arguments["page_table"] = np.where(
        np.arange(SPEC.max_pages) * 16 < arguments["lengths"][:, None],
        arguments["page_table"],
        kv_cache.SCRATCH_PAGE,
    )
    words = arguments["words"]
    mask = (words[..., :1] >> np.arange(5)) & 1 == 1
    visible = {
        "causal": attention.Visibility(),
        "mask": attention.Visibility(ancestors=mask),
        "words": attention.Visibility(ancestors=mask, words=words),
    }[seen]
    window = 3 if seen == "mask" else None
    ours = parts(visible, KERNEL, arguments, window)
    portable = parts(visible, None, arguments, window)
    for part, wanted in zip(ours, portable, strict=True):
        np.testing.assert_allclose(part, wanted, atol=2e-6)
    assert np.abs(portable[0] - portable[1]).max() > 0.1


def test_what_is_packed_for_training_is_refused():
    segment = jnp.zeros((2, 5), jnp.int32)
    visible = attention.Visibility(segment=segment, prefix=segment)
    with pytest.raises(NotImplementedError, match="attention='portable'"):
        parts(visible, KERNEL, arg_specs.make(SPEC), None)
