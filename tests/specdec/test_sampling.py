"""The sampling law against a slow twin, and its draws against the law."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.specdec import twins
from tlt_jax.specdec import noise, sampling

SETTINGS = [
    {},
    dict(temperature=0.6),
    dict(temperature=1.7),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.37),
    dict(top_p=1e-9),
    dict(min_p=0.11),
    dict(temperature=0.5, top_k=9, top_p=0.81, min_p=0.03),
    dict(temperature=2.3, top_k=7, top_p=0.63),
    dict(temperature=1.4, top_p=0.72, min_p=0.31),
    dict(temperature=0),
    dict(temperature=0, top_k=3, top_p=0.5, min_p=0.2),
]
SIZES = [61, 128]  # in lanes and not


def some_logits(num_tokens, seed=0):
    """Twelve rows: half with many ties, two with tokens that the model excludes."""
    rng = np.random.default_rng(seed)
    logits = 2.5 * rng.normal(size=(12, num_tokens))
    logits[6:] = np.round(logits[6:])
    logits[[5, 11], 3::7] = -np.inf
    return logits.astype(np.float32)


# These programs run once or twice: compiling them is what takes time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
compiled_law = jit(sampling.law, static_argnums=1)


def law_of(logits, settings):
    return compiled_law(logits, sampling.SamplingConfig(**settings))


@jit
def draws(law, keys, positions):
    """Tokens and their log-probabilities, `[12, num_positions]`."""

    def at(position):
        here = jnp.full((12,), position)
        tokens = law.draw(noise.gumbel(keys, here, law.scores.shape[-1]))
        return tokens, law.logprob_of(tokens)

    return jax.lax.map(at, positions)


@jit
def readings(law):
    return law.logprobs(), law.entropy()


@pytest.mark.parametrize("num_tokens", SIZES)
def test_law_and_draws_equal_their_definition(num_tokens):
    logits = some_logits(num_tokens)
    keys = noise.request_keys(0, range(12))
    # The number of tokens changes how reductions are made, not what is kept.
    for settings in SETTINGS if num_tokens == SIZES[0] else SETTINGS[9:13]:
        expected = np.array([twins.law(row, **settings) for row in logits])
        support = np.isfinite(expected)
        law = law_of(logits, settings)
        logprobs, entropy = readings(law)
        np.testing.assert_array_equal(np.isfinite(logprobs), support, str(settings))
        np.testing.assert_allclose(logprobs, expected, atol=2e-5, rtol=2e-6)
        np.testing.assert_allclose(np.exp(logprobs).sum(-1), 1, atol=1e-5)
        safe = np.where(support, expected, 0)
        plogp = np.where(support, np.exp(safe) * safe, 0)
        np.testing.assert_allclose(entropy, -plogp.sum(-1), atol=2e-5)
        # What is drawn is inside the support, and scored by the same law.
        tokens, scored = draws(law, keys, np.arange(40, dtype=np.int32))
        for drawn, chosen in zip(np.asarray(tokens), np.asarray(scored), strict=True):
            wanted = expected[np.arange(12), drawn]
            np.testing.assert_allclose(chosen, wanted, atol=2e-5)


def test_top_p_sorts_numbers_alone():
    """GPUs sort stably by sorting indices as well: twice the bytes, in every step."""
    cfg = sampling.SamplingConfig(top_p=0.9)
    logits = jax.ShapeDtypeStruct((2, 3, 128), jnp.float32)
    text = jax.jit(sampling.law, static_argnums=1).lower(logits, cfg).as_text()
    sorts = [line for line in text.splitlines() if "stablehlo.sort" in line]
    assert len(sorts) == 1 and "is_stable = false" in sorts[0]
    assert re.search(r"sort\"\(%[^,]*\) ", sorts[0]), sorts
    plain = jax.jit(sampling.law, static_argnums=1).lower(
        logits, sampling.SamplingConfig()
    )
    assert "stablehlo.sort" not in plain.as_text()


def test_the_definition_orders_temperature_top_k_top_p_min_p():
    logits = np.log([0.4, 0.3, 0.2, 0.1])

    def num_kept(**settings):
        return np.isfinite(twins.law(logits, **settings)).sum()

    # Flattened first, top-p keeps a third token; cut first, it would keep two.
    assert num_kept(top_p=0.65) == 2
    assert num_kept(top_p=0.65, temperature=2.0) == 3
    # Of the three that top-k leaves the first two have 0.78, of all they have 0.7.
    assert num_kept(top_p=0.75) == 3
    assert num_kept(top_p=0.75, top_k=3) == 2
    # Relative to the largest after tempering.
    assert num_kept(min_p=0.4) == 3
    assert num_kept(min_p=0.4, temperature=0.5) == 2
    # Equals are kept or dropped together; one token is always kept.
    tied = np.array([0, 2, 1, 2, -1])
    assert np.isfinite(twins.law(tied, top_k=1)).tolist() == [0, 1, 0, 1, 0]
    assert np.isfinite(twins.law(tied, top_p=1e-9)).tolist() == [0, 1, 0, 1, 0]
    assert np.isfinite(twins.law(tied, temperature=0)).tolist() == [0, 1, 0, 0, 0]


def test_leading_axes_are_kept():
    logits = some_logits(61)
    tokens = np.arange(12)
    flat = law_of(logits, SETTINGS[9])
    law = law_of(logits.reshape(2, 6, 61), SETTINGS[9])
    np.testing.assert_array_equal(
        law.logprob_of(tokens.reshape(2, 6)), flat.logprob_of(tokens).reshape(2, 6)
    )
    np.testing.assert_array_equal(
        law.draw(np.zeros((2, 6, 61))), flat.draw(np.zeros((12, 61))).reshape(2, 6)
    )


@pytest.mark.parametrize("num_tokens", [1, 5, 128])
def test_argmax_takes_the_first_of_equals_and_stays_in_the_vocabulary(num_tokens):
    rng = np.random.default_rng(0)
    argmax = jax.jit(sampling.argmax)
    scores = rng.integers(0, 4, (50, num_tokens)).astype(np.float32)
    scores[0] = -np.inf
    scores[1, :-1] = -np.inf
    np.testing.assert_array_equal(argmax(scores), np.argmax(scores, axis=-1))
    assert argmax(scores).dtype == jnp.int32
    scores[2, num_tokens // 2] = np.nan
    assert 0 <= argmax(scores)[2] < num_tokens


@pytest.mark.parametrize("num_tokens", [61, 128])
def test_log_sum_exp_bears_large_and_excluded_scores(num_tokens):
    scores = some_logits(num_tokens)
    expected = np.log(np.sum(np.exp(scores.astype(np.float64)), -1))
    np.testing.assert_allclose(sampling.log_sum_exp(scores), expected, rtol=1e-6)
    far = jnp.asarray(scores + 1e4)
    np.testing.assert_allclose(sampling.log_sum_exp(far), expected + 1e4, rtol=1e-6)
    slope = jax.grad(lambda x: sampling.log_sum_exp(x).sum())(jnp.asarray(scores))
    np.testing.assert_allclose(slope, np.exp(scores - expected[:, None]), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [SETTINGS[0], SETTINGS[1], SETTINGS[4], SETTINGS[9], SETTINGS[10]],
    ids=str,
)
def test_gradients_are_those_of_the_truncated_law(settings):
    logits = some_logits(61)
    expected = np.exp([twins.law(row, **settings) for row in logits])
    support = expected > 0
    inside = np.argmax(logits, -1)
    outside = np.argmin(np.where(np.isfinite(logits), logits, np.inf), -1)

    @jit
    def slopes(logits):
        def total(logits, of):
            law = sampling.law(logits, sampling.SamplingConfig(**settings))
            return jnp.sum(of(law))

        of_logprob = [lambda law, t=t: law.logprob_of(t) for t in (inside, outside)]
        readings = (*of_logprob, lambda law: law.entropy())
        return [jax.grad(total)(logits, of) for of in readings]

    temperature = settings.get("temperature", 1.0)
    at_inside, at_outside, of_entropy = (
        np.asarray(slope) * temperature for slope in slopes(logits)
    )
    np.testing.assert_allclose(at_inside, np.eye(61)[inside] - expected, atol=1e-5)
    assert np.all(np.isfinite(at_outside))
    assert np.all(of_entropy[~support] == 0)
    logprobs = np.log(np.where(support, expected, 1))
    entropy = -np.sum(expected * logprobs, -1, keepdims=True)
    np.testing.assert_allclose(of_entropy, -expected * (logprobs + entropy), atol=1e-5)


@pytest.mark.parametrize("settings", [SETTINGS[i] for i in (2, 4, 6, 9, 11)], ids=str)
def test_frequencies_of_draws_are_the_laws(settings):
    num, row = 20_000, 5
    logits = some_logits(61)
    law = law_of(logits, settings)
    law = jax.tree.map(lambda leaf: jnp.repeat(leaf[row : row + 1], 12, axis=0), law)
    keys = noise.request_keys(1, range(12))
    tokens, _ = draws(law, keys, np.arange(-(-num // 12), dtype=np.int32))
    counts = np.bincount(np.ravel(tokens)[:num], minlength=61)
    probs = np.exp(twins.law(logits[row], **settings))
    assert not counts[probs == 0].any()
    # Rare tokens together, so that every expected count is large.
    rare = probs * num < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(probs[~rare], probs[rare].sum()) * num
    kept = expected > 0
    assert kept.sum() > 1
    assert scipy.stats.chisquare(counts[kept], expected[kept]).pvalue > 0.01


@pytest.mark.parametrize(
    "settings,message",
    [
        (
            dict(temperature=-0.1),
            "temperature=-0.1 is out of range: 0 or at least 0.001",
        ),
        (dict(temperature=float("nan")), "temperature=nan is not finite"),
        (dict(temperature=float("inf")), "temperature=inf is not finite"),
        (dict(top_k=-1), "top_k=-1 is out of range: at least 0"),
        (dict(top_p=0.0), "top_p=0.0 is out of range: at least 1e-09"),
        (dict(top_p=1.01), "top_p=1.01 is out of range: at least 1e-09, at most 1"),
        (dict(top_p=float("nan")), "top_p=nan is not finite"),
        (dict(min_p=1.0), "min_p=1.0 is out of range: at least 0, at most 0.999"),
        (dict(min_p=-0.1), "min_p=-0.1 is out of range: at least 0, at most 0.999"),
        (dict(min_p=float("nan")), "min_p=nan is not finite"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sampling.SamplingConfig(**settings)
