"""An engine whose drafts are accepted by a chain rule: the law of its completions."""

import jax
import numpy as np
import pytest
import scipy.stats

from tests import mutation
from tests.rl import engines
from tests.rl.engine import test_engine_speculation as speculating
from tlt_jax import types
from tlt_jax.specdec import chain, strategy
from tlt_jax.specdec.tuners import tuner

NUM, LIMIT = 4000, 3
PROMPT = np.array([7, 3, 11], np.int32)
# Calls end within accepted runs, and rows come and go.
SIZES = dict(max_rows=16, steps_per_call=2, max_length=8, page_size=2)


@pytest.fixture(scope="module")
def law():
    """Probability of every completion, by a full forward for every text.

    Of its kinds of tokens, as there are too many completions: 0 ends, 1 are those with
    the likelier half of the first token's law, 2 the others. Second, each token's kind.
    """
    drawn = [
        (),
        *((i,) for i in range(32)),
        *((i, j) for i in range(32) for j in range(32)),
    ]
    texts = np.zeros((len(drawn), len(PROMPT) + 2), np.int32)
    for text, tokens in zip(texts, drawn, strict=True):
        text[: len(PROMPT) + len(tokens)] = [*PROMPT, *tokens]
    logits = jax.vmap(engines.full_logits, (None, 0))(engines.PARAMS, texts)
    ends = [len(PROMPT) + len(tokens) - 1 for tokens in drawn]
    scores = np.asarray(logits, np.float64)[np.arange(len(drawn)), ends]
    probs = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    probs = dict(zip(drawn, probs, strict=True))
    order = np.argsort(-probs[()])
    before = np.cumsum(probs[()][order]) - probs[()][order]
    kinds = np.full(32, 2)
    kinds[order[before < 0.5]] = 1
    kinds[engines.EOS] = 0
    found = {}

    def grow(tokens, prob):
        if len(tokens) == LIMIT or (tokens and tokens[-1] == engines.EOS):
            name = tuple(kinds[list(tokens)])
            found[name] = found.get(name, 0.0) + prob
            return
        for token, p in enumerate(probs[tokens]):
            grow((*tokens, token), prob * p)

    grow((), 1.0)
    assert abs(sum(found.values()) - 1) < 1e-9
    return found, kinds


class Turns(tuner.Static):
    """Every third call decodes plainly."""

    num_calls = 0

    def choose(self, num_rows):
        self.num_calls += 1
        return super().choose(num_rows) if self.num_calls % 3 else None


def pvalue(law):
    """Of the engine's completions: the chance that the law's are so far from it."""
    table = strategy.parse_arms(("16:D3K1V4",))
    changes = dict(table=table, rule="block")
    engine = speculating.engine_of("chain", speculating.EAGLE, changes, **SIZES)
    engine._speculator._tuner = Turns(table)
    requests = [types.Request(i, 1, i, PROMPT, LIMIT) for i in range(NUM)]
    completions, stats = engine.run(requests, engines.SEED)
    engine.pool.close()
    # What was sampled has no score that could follow anything.
    assert stats.taus == []
    assert stats.rule == "block" and set(stats.strategies) == {"none", "D3K1V4"}
    # Most tokens are of steps by the rule.
    assert sum(stats.num_accepted) > NUM and stats.accept_length > 1.2
    probs, kinds = law
    found = dict.fromkeys(probs, 0)
    for completion in completions:
        found[tuple(kinds[completion.tokens])] += 1
    expected = np.array([*probs.values()]) * NUM
    assert expected.min() > 5
    return scipy.stats.chisquare([*found.values()], expected).pvalue


def test_the_law_is_the_targets(law):
    assert pvalue(law) > 0.01


def test_an_error_in_the_rule_shows_in_the_law(law, monkeypatch):
    old = "return rejection.normalised(rest, target_probs)"
    new = "return rejection.normalised(target_probs, target_probs)"
    mutated = mutation.mutate(chain, old, new)
    monkeypatch.setitem(chain.RULES, "block", mutated.RULES["block"])
    assert pvalue(law) < 1e-6
