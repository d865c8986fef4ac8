"""A kernel's part joins with others as the portable walk's does; what it reads by is
checked in programs that ask for it.
"""

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
    view = kv_cache.CacheView(cache, a["page_table"], a["lengths"])
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


# Which of them says it depends on how jax called the program.
STOPPED = (jax.errors.JaxRuntimeError, ValueError)
LENGTHS, NUM_PAGES, PAGE_SIZE = [20, 0], 4, 16


@jax.jit
def checked(page_table, lengths, positions, mask):
    """In a loop, as decoding has it: lengths are found wrong on the way."""
    pages = jnp.zeros((1, NUM_PAGES, 1, 2, PAGE_SIZE))
    cache = kv_cache.PagedCache(pages, pages)
    visible = attention.Visibility(ancestors=mask)

    def step(lengths):
        view = kv_cache.CacheView(cache, page_table, lengths)
        return transformer.checked_view(view, positions, visible).lengths + 6

    return jax.lax.while_loop(lambda lengths: lengths[0] < 30, step, lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(page_table=[[3, 0], [0, 0]]),
            r"page_table\[0, 1\]=0 is no page .* 1 to 3",
        ),
        (dict(page_table=[[9, 1], [0, 0]]), r"page_table\[0, 0\]=9"),
        (dict(page_table=[[3, -1], [0, 0]]), r"page_table\[0, 1\]=-1"),
        (dict(lengths=[20, 28]), r"lengths\[1\]=34 is outside 0 to 32"),
        (dict(lengths=[-1, 0]), r"lengths\[0\]=-1"),
        (dict(positions=[[25, 26], [9, 9]]), r"positions\[0\] .*lengths\[0\]=26"),
        (dict(mask=[[1, 0], [1, 0]]), r"words\[0, 1\] does not name node 1 itself"),
        (dict(mask=[[1, 1], [1, 1]]), r"words\[0, 0\] names a node behind node 0"),
    ],
)
def test_a_program_stops_where_a_value_is_wrong(change, message):
    given = dict(page_table=[[3, 1], [2, 2]], lengths=LENGTHS)
    given |= dict(positions=[[40, 41]] * 2, mask=[[1, 0], [1, 1]]) | change
    given = {k: np.array(v, np.int32) for k, v in given.items()}
    given["mask"] = np.broadcast_to(given["mask"] == 1, (2, 2, 2))
    with pytest.raises(STOPPED, match=message):
        jax.block_until_ready(checked(**given))


def test_right_values_go_through():
    # Behind a row's last page the table may hold anything.
    table = np.array([[3, 1], [2, -7]], np.int32)
    mask = np.tile(np.tri(2, dtype=bool), (2, 1, 1))
    positions = np.full((2, 2), 40, np.int32)
    done = checked(table, np.array(LENGTHS, np.int32), positions, mask)
    np.testing.assert_array_equal(done, [32, 12])
