"""Chain rules by enumeration: every chain, every outcome of the tests, every token."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tlt_jax.specdec import chain, protocols, rejection, sampling, tree

VOCAB, DEPTH = 3, 3


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def decide_by_rejection(target_probs, draft_probs, draft_tokens):
    """What becomes of a chain, from what the walk down a tree computes."""
    laws = target_probs[..., :-1, :], draft_probs
    rest = rejection.residual(*laws)
    return chain.Decision(
        jnp.minimum(rejection.ratios(*laws, draft_tokens), 1.0),
        jnp.concatenate([rest, target_probs[..., -1:, :]], axis=-2),
    )


def step_by_rejection(target_probs, draft_probs, draft_tokens, uniforms, gumbel):
    """The walk down a chain: `num_accepted`, and the token that follows."""
    (depth,) = draft_tokens.shape
    index = jnp.arange(depth + 1, dtype=jnp.int32)
    line = tree.DraftTree(
        tokens=jnp.pad(draft_tokens, (1, 0))[None],
        parents=jnp.maximum(index - 1, 0)[None],
        depths=index[None],
        valid=jnp.ones((1, depth + 1), bool),
        chances=jnp.ones((1, depth + 1)),
        sources=index[None] - 1,
    )
    behind = jnp.where(index[1:] < depth, index[1:], 0)
    # Rounded as the target's are, so that equal laws are.
    draft_probs = jnp.exp(jnp.log(draft_probs))
    laws = protocols.Laws(draft_probs[None], behind[None], None)
    scores = jnp.log(target_probs)[None]
    walk, _ = rejection.Rejection().judge(
        sampling.Law(scores, jnp.zeros_like(scores[..., 0])),
        line,
        protocols.Proposal(None, laws),
        rejection.Chance(None, uniforms[None], gumbel[None]),
        None,
    )
    (num_accepted,) = walk.num_accepted
    return num_accepted, walk.tokens[0, num_accepted]


def step_by_block(target_probs, draft_probs, draft_tokens, uniforms, gumbel):
    decision = chain.block_rule(target_probs, draft_probs, draft_tokens)
    return chain.keep(decision, uniforms, gumbel)


# What each makes of a chain, and with chance.
RULES = {
    "rejection": (decide_by_rejection, step_by_rejection),
    "block": (chain.block_rule, step_by_block),
}
NAMES = list(RULES)


def prefix_laws(seed, zeros=False, vocab=VOCAB):
    """A law of its own after every prefix of up to DEPTH tokens."""
    rng = np.random.default_rng(seed)
    laws = {}
    for num in range(DEPTH + 1):
        for prefix in itertools.product(range(vocab), repeat=num):
            weights = rng.gamma(0.7, size=vocab)
            if zeros and rng.random() < 0.5:
                weights[rng.integers(vocab)] = 0.0
            laws[prefix] = weights / weights.sum()
    return laws


def along(laws, chains, num):
    """Laws at the `num` first places of each chain, `[chains, num, V]`."""
    return np.array([[laws[chain[:i]] for i in range(num)] for chain in chains])


def chain_probs(laws, chains):
    return np.array(
        [np.prod([laws[c[:i]][c[i]] for i in range(len(c))]) for c in chains]
    )


def outcomes(name, target, draft_probs, chains):
    """Every outcome: `num_accepted`, its probability and the law of what follows.

    Arrays over chains and passed/failed patterns, `[chains, 2**depth]`; the law has V.
    """
    decide, step = RULES[name]
    tokens = np.array(chains, np.int32)
    depth = tokens.shape[1]
    target_probs = along(target, chains, depth + 1)
    vocab = target_probs.shape[-1]
    decision = decide(target_probs, draft_probs, tokens)
    thresholds = np.asarray(decision.thresholds)[:, None]
    assert thresholds.dtype == np.float64
    assert thresholds.min() >= 0 and thresholds.max() <= 1 + 1e-12
    passed = np.array(list(itertools.product([True, False], repeat=depth)))
    probability = np.prod(np.where(passed, thresholds, 1 - thresholds), axis=-1)
    uniforms = np.where(passed, thresholds / 2, (1 + thresholds) / 2)
    # Noise that picks token v wherever v may be drawn at all.
    noise = 1e3 * np.eye(vocab)

    def at_chain(laws, drafts, tokens, uniforms):
        def once(uniform, gumbel):
            return step(laws, drafts, tokens, uniform, gumbel)

        each_noise = jax.vmap(once, (None, 0))
        return jax.vmap(each_noise, (0, None))(uniforms, noise)

    num_accepted, drawn = jax.jit(jax.vmap(at_chain))(
        target_probs, draft_probs, tokens, uniforms
    )
    # The threshold 0 is never passed, 1 never failed; there the halves mean nothing.
    num_accepted = np.asarray(num_accepted)
    assert (num_accepted == num_accepted[..., :1]).all()
    num_accepted = num_accepted[..., 0]
    follow = np.take_along_axis(
        np.asarray(decision.replacement), num_accepted[..., None], axis=1
    )
    possible = (follow > 0) & (probability > 0)[..., None]
    np.testing.assert_array_equal(
        np.asarray(drawn)[possible],
        np.broadcast_to(np.arange(vocab), drawn.shape)[possible],
    )
    return num_accepted, probability, follow


def output_law(name, target, draft_probs, chains, weights):
    """Law of the DEPTH + 1 next tokens; plain decoding fills up what is left."""
    vocab = len(target[()])
    law = dict.fromkeys(itertools.product(range(vocab), repeat=DEPTH + 1), 0.0)
    found = outcomes(name, target, draft_probs, chains)

    def spread(prefix, mass):
        if mass == 0:
            return
        if len(prefix) == DEPTH + 1:
            law[prefix] += mass
            return
        for v in range(vocab):
            spread((*prefix, v), mass * target[prefix][v])

    for drafted, weight, *rows in zip(chains, weights, *found, strict=True):
        for num, probability, follow in zip(*rows, strict=True):
            for v in range(vocab):
                mass = weight * probability * follow[v]
                spread((*drafted[:num], v), mass)
    return law


def variation(law, target):
    """Total variation to plain decoding."""
    sequences = list(law)
    plain = chain_probs(target, sequences)
    return 0.5 * np.abs(np.array([law[s] for s in sequences]) - plain).sum()


CHAINS = list(itertools.product(range(VOCAB), repeat=DEPTH))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed,zeros", [(0, False), (1, True), (2, True)])
def test_output_law_is_the_targets(name, seed, zeros):
    target, draft = prefix_laws(seed, zeros), prefix_laws(seed + 100, zeros)
    weights = chain_probs(draft, CHAINS)
    law = output_law(name, target, along(draft, CHAINS, DEPTH), CHAINS, weights)
    assert variation(law, target) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_drafter_that_is_the_target_is_always_accepted(name):
    target = prefix_laws(3, zeros=True)
    draft_probs = along(target, CHAINS, DEPTH)
    weights = chain_probs(target, CHAINS)
    law = output_law(name, target, draft_probs, CHAINS, weights)
    assert variation(law, target) < 1e-12
    num, probability, _ = outcomes(name, target, draft_probs, CHAINS)
    kept = np.sum(weights * np.sum(num * probability, axis=1))
    np.testing.assert_allclose(kept, DEPTH, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_chosen_without_chance_is_a_point_mass(name):
    target, draft = prefix_laws(4), prefix_laws(104)
    likeliest = ()
    for _ in range(DEPTH):
        likeliest = (*likeliest, int(np.argmax(draft[likeliest])))
    points = np.eye(VOCAB)[np.array([likeliest])]
    law = output_law(name, target, points, [likeliest], [1.0])
    assert variation(law, target) < 1e-12
    # The law that the argmax was taken of is not the law of the chain.
    laws = along(draft, [likeliest], DEPTH)
    wrong = output_law(name, target, laws, [likeliest], [1.0])
    assert variation(wrong, target) > 0.01


EXPECTED = {
    "rejection": {1: 0.65, 2: 1.0725, 3: 1.3471, 4: 1.5256, 6: 1.7171},
    "block": {1: 0.65, 2: 1.125, 3: 1.4871, 4: 1.7706, 6: 2.1795},
}


@pytest.mark.parametrize("name", NAMES)
def test_expected_accepted_counts_of_a_memoryless_pair(name):
    target_law = np.array([0.5, 0.2, 0.2, 0.1])
    draft_law = np.array([0.15, 0.55, 0.2, 0.1])
    decide = jax.jit(RULES[name][0])
    for depth, expected in EXPECTED[name].items():
        chains = np.array(list(itertools.product(range(4), repeat=depth)), np.int32)
        target_probs = np.broadcast_to(target_law, (len(chains), depth + 1, 4))
        draft_probs = np.broadcast_to(draft_law, (len(chains), depth, 4))
        tests = np.asarray(decide(target_probs, draft_probs, chains).thresholds)
        if name == "rejection":
            kept = np.cumprod(tests, axis=1).sum(axis=1)
        else:
            # At least i are kept unless all tests from i on fail.
            kept = (1 - np.cumprod(1 - tests[:, ::-1], axis=1)).sum(axis=1)
        weights = np.prod(draft_law[chains], axis=1)
        np.testing.assert_allclose(np.sum(weights * kept), expected, atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_with_chance_of_its_own(name):
    num = 40_000
    target, draft = prefix_laws(6), prefix_laws(106)
    weights = chain_probs(draft, CHAINS)
    rng = np.random.default_rng(0)
    picked = rng.choice(len(CHAINS), size=num, p=weights)
    target_probs = along(target, CHAINS, DEPTH + 1)[picked].astype(np.float32)
    draft_probs = along(draft, CHAINS, DEPTH)[picked].astype(np.float32)
    uniforms = rng.random((num, DEPTH), np.float32)
    gumbel = rng.gumbel(size=(num, VOCAB)).astype(np.float32)
    chains = np.array(CHAINS, np.int32)[picked]
    step = jax.jit(jax.vmap(RULES[name][1]))
    kept = step(target_probs, draft_probs, chains, uniforms, gumbel)
    num_accepted, token = map(np.asarray, kept)
    first = np.where(num_accepted > 0, chains[:, 0], token)
    counts = np.bincount(first, minlength=VOCAB)
    assert scipy.stats.chisquare(counts, target[()] * num).pvalue > 0.01
    # And the last token of what was kept whole, after each of its chains.
    for whole in CHAINS[:3]:
        here = (num_accepted == DEPTH) & (chains == whole).all(axis=1)
        counts = np.bincount(token[here], minlength=VOCAB)
        if here.sum() > 200:
            expected = target[whole] * here.sum()
            assert scipy.stats.chisquare(counts, expected).pvalue > 0.01


def cells(laws, length):
    """Cells of a position's noise, in each of which every law draws one token.

    Pairs of a value within and the width; `laws` are by prefix, those of `length` here.
    """
    ends = {0.0, 1.0}
    for probs in laws:
        for prefix, law in probs.items():
            if len(prefix) == length:
                ends.update(np.cumsum(law)[:-1])
    ends = np.sort([*ends])
    return list(zip((ends[1:] + ends[:-1]) / 2, np.diff(ends), strict=True))


def drawn(law, noise):
    return int(np.sum(np.cumsum(law)[:-1] < noise))


def behind(name, target, draft, first):
    """What a step by a chain rule makes of two drafts behind the first token: texts of
    up to three tokens with their probabilities.
    """
    rest, guesses = (
        {prefix[1:]: law for prefix, law in laws.items() if prefix[:1] == (first,)}
        for laws in (target, draft)
    )
    pairs = list(itertools.product(range(VOCAB), repeat=2))
    found = outcomes(name, rest, along(guesses, pairs, 2), pairs)
    texts = {}
    for pair, weight, *rows in zip(
        pairs, chain_probs(guesses, pairs), *found, strict=True
    ):
        for num, probability, follow in zip(*rows, strict=True):
            for token in range(VOCAB):
                text = (first, *pair[:num], token)[:3]
                mass = weight * probability * follow[token]
                texts[text] = texts.get(text, 0.0) + mass
    return texts


def law_of_mixed_steps(target, draft, chains, goes_on_keyed):
    """Law of three tokens: a keyed walk of two drafts is cut behind its first token;
    then come keyed steps, or one by a chain rule with a keyed one for what is left.

    `chains` are what it makes `behind` each first token; `goes_on_keyed` is told the
    first token, and how many drafts the walk had accepted.
    """
    law = dict.fromkeys(itertools.product(range(VOCAB), repeat=3), 0.0)
    places = (cells((target, draft), length) for length in range(3))
    for (u, du), (v, dv), (w, dw) in itertools.product(*places):
        volume = du * dv * dw
        # The drafter knows the noise, too.
        first, guess = drawn(target[()], u), drawn(draft[()], u)
        second = drawn(target[(first,)], v)
        accepted = int(first == guess)
        accepted += accepted and int(second == drawn(draft[(guess,)], v))
        keyed = {(first, second): 1.0}
        texts = keyed if goes_on_keyed(first, accepted) else chains[first]
        for text, probability in texts.items():
            third = (drawn(target[text], w),) if len(text) == 2 else ()
            law[text + third] += volume * probability
    return law


@pytest.mark.parametrize("name", NAMES)
def test_keyed_steps_may_come_between_unless_what_they_saw_decides_it(name):
    target, draft = prefix_laws(7), prefix_laws(107)
    chains = [behind(name, target, draft, first) for first in range(VOCAB)]

    def distance(goes_on_keyed):
        law = law_of_mixed_steps(target, draft, chains, goes_on_keyed)
        return variation(law, target)

    # By nothing, or by what is settled.
    assert distance(lambda *_: False) < 1e-12
    assert distance(lambda first, _: first == 1) < 1e-12
    # By what the walk had accepted of tokens that are still to be drawn.
    assert distance(lambda _, accepted: accepted == 2) > 0.01
