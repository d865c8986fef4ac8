"""Rules for sampled drafts in the decode loop: other tokens, plain decoding's law.

Their noise is continuous and many-fold, so that the law of completions is counted here
over many rows of one batch, and not enumerated: what a step makes of its chance is
enumerated in `test_chain_rules`, and of trees in `test_rejection`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests import mutation
from tests.specdec import hosts, test_speculate, twins
from tests.specdec import test_law as whole
from tlt_jax.models.drafters import drafter
from tlt_jax.specdec import (
    chain,
    decode,
    noise,
    protocols,
    rejection,
    sampling,
    tree,
)
from tlt_jax.specdec import strategy as strategy_lib

NUM_ROWS = 10_000
# A row of a tree takes as long as ten of a chain.
NUM_TREE_ROWS = 4_000
CHAIN = strategy_lib.Strategy(3, 1, 4)
SMALL_VOCAB = dict(
    cfg=drafter.of_target(whole.CFG, draft_vocab_size=2),
    draft_ids=jnp.array([0, 2], jnp.int32),
)

BLOCK = SMALL_VOCAB | dict(
    cfg=dataclasses.replace(whole.BLOCK, draft_vocab_size=2),
)
TREES = SMALL_VOCAB | dict(num_rows=NUM_TREE_ROWS)
BLOCK_TREES = dict(cfg=whole.BLOCK, num_rows=NUM_TREE_ROWS)
# By ranks the root's children, two behind the first and one behind the second, and one
# more behind each of those.
TREE = strategy_lib.Strategy(3, 2, 8)


def rollouts(sampling_cfg, rule, most=4, num_rows=NUM_ROWS, **how):
    made = whole.Rollouts(sampling_cfg, most, np.ones(num_rows), rule=rule, **how)
    made.keys = noise.request_keys(7, range(num_rows))
    return made


def counts_of(made, strategies, limit=whole.LONGEST):
    found = made.law(strategies, limit)
    wanted = whole.whole_law(made.sampling_cfg, made.most)
    counts = np.array([found.pop(drawn, 0) for drawn in wanted])
    assert not found  # completions that the target cannot draw
    expected = np.array(list(wanted.values()))
    return counts, expected / expected.sum() * counts.sum()


@pytest.mark.parametrize(
    "sampling_cfg,rule,strategies,limit,how",
    [
        (whole.TRUNCATED, "rejection", (CHAIN,), whole.LONGEST, SMALL_VOCAB),
        (whole.LAW, "block", (CHAIN, None), 2, {}),
        # A block's laws, given the tokens before, of a small vocabulary.
        (whole.LAW, "rejection", (CHAIN,), whole.LONGEST, BLOCK),
        # Keyed trees and chains in turns, as where a drafter comes.
        (whole.LAW, "block", (whole.SINGLE, CHAIN), 2, {}),
        # Trees, of two tokens and of all, beside chains and plain decoding.
        (whole.TRUNCATED, "rejection", (TREE, CHAIN, None), 3, TREES),
        (whole.LAW, "rejection", (whole.WIDE, TREE), 2, BLOCK_TREES),
    ],
    ids="rejection block block_drafter mixed tree block_tree".split(),
)
def test_the_law_is_the_targets(sampling_cfg, rule, strategies, limit, how):
    made = rollouts(sampling_cfg, rule, **how)
    counts, expected = counts_of(made, strategies, limit)
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.01


# Which rule, what stands for what.
MUTATIONS = {
    "tests by the noise of the drafts": (
        "rejection",
        "at_places(noise.uniform, testing)",
        "at_places(noise.uniform, drafting)",
    ),
    "drafts by the noise of an earlier step": (
        "block",
        "noise.step_keys(keys, lengths, 3)",
        "noise.step_keys(keys, 0 * lengths, 3)",
    ),
    "rejected and drawn from the target's law, not the residual": (
        "rejection",
        "rest = jnp.maximum(target_probs - draft_probs, 0.0)",
        "rest = target_probs",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_error_shows_in_the_law(monkeypatch, name):
    rule, old, new = MUTATIONS[name]
    mutated = mutation.mutate(rejection, old, new)
    if rule == "block":
        monkeypatch.setattr(chain.BlockRule, "chance", mutated.Fresh.chance)
    else:
        monkeypatch.setitem(chain.RULES, rule, mutated.Rejection())
    made = rollouts(whole.LAW, rule)
    counts, expected = counts_of(made, (CHAIN,))
    assert scipy.stats.chisquare(counts, expected).pvalue < 1e-6


@pytest.mark.parametrize(
    "rule,strategy,some_end",
    [("block", CHAIN, True), ("rejection", test_speculate.TREE, False)],
)
def test_texts_log_probs_and_caches(rule, strategy, some_end):
    law = hosts.TRUNCATED
    how = test_speculate.WIDE | dict(cfg=test_speculate.FUSED, rule=rule)
    host = test_speculate.Host(hosts.asks(), **how)
    host.prefill(4)
    test_speculate.run(host, law, (strategy,), token_limits=(3, 8))
    host.check_cache()

    logits, *_ = hosts.full_forward(
        hosts.weights(), hosts.padded([ask.text for ask in host.rows])
    )
    num_ended = 0
    for row, ask in enumerate(host.rows):
        first = len(ask.prompt) - 1
        laws = [twins.law(x, **vars(law)) for x in logits[row, first:]]
        exact = [laws[i][token] for i, token in enumerate(ask.drawn)]
        np.testing.assert_allclose(ask.logprobs, exact, rtol=0, atol=1e-5)
        ended = [token in hosts.EOS for token in ask.drawn]
        assert not any(ended[:-1])
        assert ended[-1] or len(ask.drawn) == ask.limit
        num_ended += ended[-1]
    assert (num_ended > 0) == some_end and num_ended < len(host.rows)


def test_every_draw_has_noise_of_its_own():
    num, vocab_size = 5, 40
    cfg = dataclasses.replace(whole.CFG, vocab_size=vocab_size)
    keys = np.repeat(noise.request_keys(1, [3, 2**33]), 3, axis=0)
    lengths = np.array([4, 5, 6] * 2, np.int32)
    chance = jax.jit(chain.RULES["block"].chance, static_argnums=(2, 3))
    how = num + 1, decode.Settings(cfg)
    made = jax.device_get(chance(keys, lengths, *how))
    assert made.draft.shape == (6, num, vocab_size)
    assert made.uniforms.shape == (6, num)
    assert np.all((made.uniforms >= 0) & (made.uniforms < 1))
    gumbel = jax.jit(noise.gumbel, static_argnums=2)
    plain = [gumbel(keys[::3], np.full(2, t), vocab_size) for t in range(12)]
    drawn = [made.draft.reshape(-1), made.follow.reshape(-1), np.reshape(plain, -1)]
    # The same words give the same noise, whatever is made of them.
    uniforms = [1 - np.exp(-np.exp(-np.float64(x))) for x in np.concatenate(drawn)]
    uniforms = np.concatenate([uniforms, np.float64(made.uniforms).reshape(-1)])
    assert np.diff(np.sort(uniforms)).min() > 1e-11
    # A row's noise does not depend on the batch.
    again = jax.device_get(chance(keys[::-1], lengths[::-1], *how))
    jax.tree.map(
        np.testing.assert_array_equal, again, jax.tree.map(lambda x: x[::-1], made)
    )


@pytest.mark.parametrize("rule", ("rejection", "block"))
def test_a_broken_drafter_costs_speed_only(rule):
    scores = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    law = sampling.Law(np.tile(scores, (1, 3, 1)), np.zeros((1, 3), np.float32))
    line = tree.DraftTree(
        tokens=np.array([[1, 2, 2]], np.int32),
        parents=np.array([[0, 0, 1]], np.int32),
        depths=np.array([[0, 1, 2]], np.int32),
        valid=np.ones((1, 3), bool),
        chances=np.ones((1, 3), np.float32),
        sources=np.array([[-1, 0, 1]], np.int32),
    )
    gumbel = np.array([[-0.3, 0.4, 0.1]], np.float32)
    chance = rejection.Chance(None, np.zeros((1, 2), np.float32), gumbel)
    laws = np.full((1, 2, 3), np.nan, np.float32)
    behind = np.array([[1, 0]], np.int32)
    proposal = protocols.Proposal(None, protocols.Laws(laws, behind, None))
    judge = jax.jit(chain.RULES[rule].judge, static_argnums=4)
    walk, _ = judge(law, line, proposal, chance, None)
    assert walk.num_accepted.tolist() == [0]
    assert walk.tokens[0, 0] == np.argmax(scores + gumbel)


@pytest.mark.parametrize(
    "rule,strategy,temperature,message",
    [
        ("residual", "D3K1V4", 1.0, "rule='residual': use one of keyed"),
        ("block", "D3K2V8", 1.0, "strategy D3K2V8 is none: use D3K1V4"),
        (
            "rejection",
            "D3K2V8N16",
            1.0,
            "whole trees .* D3K2V8N16 is none: use D3K2V8 ",
        ),
        ("rejection", "D3K2V16-both", 1.0, "V16-both is none: use D3K2V11 "),
        ("rejection", "D3K1V4-ngram", 1.0, "D3K1V4-ngram is none"),
        ("rejection", "D3K1V7-both", 1.0, "D3K1V7-both is none"),
        ("block", "D3K1V4", 0.0, "temperature=0 samples nothing"),
    ],
)
def test_what_a_rule_cannot_judge_is_refused(rule, strategy, temperature, message):
    strategies = (strategy_lib.parse("D2K1V3"), strategy_lib.parse(strategy))
    cfg = sampling.SamplingConfig(temperature=temperature)
    with pytest.raises(ValueError, match=message):
        chain.check(rule, strategies, cfg)
    chain.check("keyed", strategies, cfg)
