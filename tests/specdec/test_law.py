"""The whole law of short rollouts, by enumeration.

Gumbel noise is continuous; here it is exchanged for a sampler with finitely many cases.
The noise of (request, position) is one number u, and the token drawn is that at which
the law's distribution function passes u: an exact sample, too. Between two neighbours
among the values that the distribution functions of all prefixes take, every prefix
draws one and the same token; so one row for each product of such cells, weighted by its
volume, covers all randomness. Everything else is what runs: drafting, trees,
verification, caches, ends and limits.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import mutation
from tests.specdec import tiny_drafter
from tlt_jax.models import config as model_config
from tlt_jax.models import experts, kv_cache, transformer
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.specdec import chain, decode, noise, protocols, sampling, speculate, verify
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import build, learned

CFG = model_config.ModelConfig(
    family="llama",
    vocab_size=3,
    num_layers=1,
    d_model=8,
    d_ff=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    tie_embeddings=False,
)
# The same with a mixture: each token passes two of four experts.
MIXTURE = dataclasses.replace(
    CFG, family="mixtral", experts=model_config.Experts(num=4, per_token=2, d_ff=12)
)
EOS = 2
PROMPT = (1, 0, 1)
LONGEST = 5  # tokens
DRAFTER = drafter.of_target(CFG)
BLOCK = drafter.of_target(CFG, architecture="block", block_size=3)
LAW = sampling.SamplingConfig(temperature=0.7)
TRUNCATED = sampling.SamplingConfig(temperature=0.25, top_p=0.8)
PAGE = 4


@functools.cache
def target(model=CFG):
    # Of this mixture texts go by four different pairs of experts.
    key = jax.random.key(9 if model.experts else 3)
    params = jax.jit(model_params.init, static_argnums=0)(model, key)
    # Softer than they come, so that no completion is too rare to matter, with an
    # attention that matters, too.
    layers = params.layers.replace(out=params.layers.out * 20)
    if model.experts:
        layers = layers.replace(down=layers.down * 4)
    return params.replace(lm_head=params.lm_head * 0.3, layers=layers)


@functools.cache
def outputs_of(model=CFG):
    """Logits and routes behind every text that has not ended, by its completion."""
    prefixes = [
        drawn
        for length in range(LONGEST)
        for drawn in itertools.product((0, 1), repeat=length)
    ]
    texts = np.zeros((len(prefixes), len(PROMPT) + LONGEST - 1), np.int32)
    for text, drawn in zip(texts, prefixes, strict=True):
        text[: len(PROMPT) + len(drawn)] = PROMPT + drawn

    @jax.jit
    def forward(params):
        positions = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
        out = transformer.forward(params, model, jnp.asarray(texts), positions)
        routes_LCBT = None if out.routing is None else out.routing.routes
        return transformer.logits(params, out.hidden), routes_LCBT

    logits, routes_LCBT = forward(target(model))
    rows = np.arange(len(prefixes))
    ends = np.array([len(PROMPT) + len(drawn) - 1 for drawn in prefixes])
    logits = np.asarray(logits, np.float64)[rows, ends]
    if model.experts:
        routes = np.moveaxis(np.asarray(routes_LCBT)[:, :, rows, ends], -1, 0)
    else:
        routes = [None] * len(rows)
    return dict(zip(prefixes, zip(logits, routes, strict=True), strict=True))


def conditional(drawn, cfg, model=CFG):
    """Probabilities behind `drawn`, as sampling documents them, in float64."""
    scores = outputs_of(model)[drawn][0] / cfg.temperature
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    before = np.cumsum(probs[order]) - probs[order]
    kept = np.zeros(3, bool)
    kept[order[before < cfg.top_p]] = True
    return np.where(kept, probs, 0) / probs[kept].sum()


def whole_law(cfg, most, model=CFG):
    """Probability of every completion."""
    law = {}

    def grow(drawn, prob):
        if (drawn and drawn[-1] == EOS) or len(drawn) == most:
            law[drawn] = prob
            return
        for token, p in enumerate(conditional(drawn, cfg, model)):
            if p > 0:
                grow((*drawn, token), prob * p)

    grow((), 1.0)
    return law


@functools.cache
def cells(cfg, most, model=CFG):
    """One u for each cell of each position, and the volumes; `[rows, most]`, `[rows]`.

    A position's cells are those of the prefixes that reach it.
    """
    sides = []
    for length in range(most):
        ends = {0.0, 1.0}
        for drawn in itertools.product((0, 1), repeat=length):
            ends.update(np.cumsum(conditional(drawn, cfg, model))[:-1])
        ends = np.sort(list(ends))
        ends = ends[np.concatenate([[True], np.diff(ends) > 1e-12])]
        sides.append(list(zip((ends[1:] + ends[:-1]) / 2, np.diff(ends), strict=True)))
    rows = np.array(list(itertools.product(*sides)))  # [rows, most, 2]
    return rows[..., 0], rows[..., 1].prod(axis=1)


def draw_by_distribution(law, noise, which=None, kernels=None):
    """The token at which the distribution function passes `noise[..., 0]`."""
    del kernels
    if which is not None:
        noise = jnp.take_along_axis(noise, which[..., None], axis=1)
    below = jnp.cumsum(jnp.exp(law.logprobs()), axis=-1)
    passed = jnp.sum(below < noise[..., :1] * (1 - 1e-6), axis=-1)
    return jnp.minimum(passed, law.scores.shape[-1] - 1).astype(jnp.int32)


class Rollouts:
    """Completions of the prompt, decoded as one batch, with a weight for each row."""

    def __init__(
        self,
        sampling_cfg,
        most,
        volumes,
        cfg=DRAFTER,
        draft_ids=None,
        rule="keyed",
        model=CFG,
    ):
        self.sampling_cfg, self.most, self.volumes = sampling_cfg, most, volumes
        self.model = model
        self.cfg, self.rule = cfg, chain.RULES[rule]
        self.samples, self.trees = rule != chain.KEYED, rule == "rejection"
        params = jax.jit(drafter.init, static_argnums=0)(cfg, jax.random.key(5))
        params = params.replace(draft_ids=draft_ids)
        if cfg.block_size:
            params = tiny_drafter.followed(params)
        self.weights = learned.weights_of(params, target(model))
        num = len(volumes)
        self.keys = np.stack([np.zeros(num), np.arange(num)], axis=1).astype(np.uint32)
        self.programs = {}
        self.run = speculate.run

    def law(self, strategies, limit=LONGEST):
        """Total probability of each completion, under a cycle of strategies.

        Budgets are in nodes a row, on average.
        """
        law = {}
        strategies = [
            s and dataclasses.replace(s, budget=s.budget * len(self.volumes))
            for s in strategies
        ]
        drawn = self.decode(strategies, min(limit, self.most))
        for tokens, volume in zip(drawn, self.volumes, strict=True):
            law[tokens] = law.get(tokens, 0.0) + volume
        return law

    def program(self, strategy):
        if strategy not in self.programs:
            settings = decode.Settings(
                self.model,
                self.sampling_cfg,
                eos_ids=(EOS,),
                max_tokens=self.most,
                feature_layers=self.cfg.feature_layers,
            )
            if strategy is None:
                fn = functools.partial(decode.decode, settings=settings)
            else:
                rule, ranking = self.rule, "coupled"
                if self.samples and (self.trees or strategy.topk == 1):
                    ranking = learned.SAMPLED
                elif self.samples:
                    # What it cannot judge stays keyed, as suffix matches do in a run.
                    rule = verify.Keyed()
                fn = functools.partial(
                    self.run,
                    proposer=build.build(strategy, settings, self.cfg, ranking),
                    rule=rule,
                    settings=settings,
                )
            self.programs[strategy] = jax.jit(fn)
        return self.programs[strategy]

    def decode(self, strategies, limit):
        num = len(self.volumes)
        table = 1 + np.arange(2 * num, dtype=np.int32).reshape(num, 2)
        sizes = 2 * num + 1, PAGE, jnp.float32
        cache = kv_cache.create(self.model, *sizes, CFG.d_model)
        draft_cache = kv_cache.create(self.cfg.layer, *sizes)
        tokens = np.zeros((num, PAGE), np.int32)
        tokens[:, : len(PROMPT) - 1] = PROMPT[:-1]
        cache = prefill_program(self.model)(
            target(self.model),
            cache,
            tokens,
            np.full(num, len(PROMPT) - 1, np.int32),
            table,
            np.zeros(num, np.int32),
        )
        texts = [list(PROMPT) for _ in range(num)]
        drafted = np.zeros(num, np.int32)
        turn = itertools.cycle(strategies)
        num_calls = 0
        while True:
            done = [len(t) - len(PROMPT) for t in texts]
            left = [
                0 if n and t[-1] == EOS else self.most - n
                for n, t in zip(done, texts, strict=True)
            ]
            num_calls += 1
            # A sampler with an error may never come to an end.
            if not any(left) or num_calls > 3 * self.most:
                return [tuple(text[len(PROMPT) :]) for text in texts]
            inputs = decode.Rows(
                page_table=table,
                lengths=np.array([len(t) - 1 for t in texts], np.int32),
                pending=np.array([t[-1] for t in texts], np.int32),
                keys=self.keys,
                remaining=np.array(left, np.int32),
            )
            strategy = next(turn)
            limits = jnp.int32(limit), jnp.int32(num + 1)
            if strategy is None:
                cache, emitted = self.program(None)(
                    target(self.model), cache, inputs, *limits
                )
            else:
                # The drafter reads whatever its cache holds: it is one of the worst.
                most = strategy.max_accept_length
                # Where rows share, there is room for one token of each.
                known = 1 if strategy.budget else most
                drafted = np.maximum(drafted, inputs.lengths - known)
                behind = np.zeros((num, most), np.int32)
                for i, text in enumerate(texts):
                    rest = text[drafted[i] + 1 :]
                    behind[i, : len(rest)] = rest
                caches, result = self.program(strategy)(
                    target(self.model),
                    protocols.Caches(cache, draft_cache),
                    inputs,
                    learned.Draft(
                        self.weights,
                        jnp.float32(0.5),
                        jnp.float32(1.25),
                        drafted,
                        behind,
                    ),
                    *limits,
                )
                cache, draft_cache = caches.target, caches.drafter
                emitted, drafted = result.emitted, np.array(result.progress[0])
            emitted = jax.device_get(emitted)
            for text, drawn, count in zip(
                texts, emitted.tokens, emitted.counts, strict=True
            ):
                text.extend(drawn[:count].tolist())


class Case(Rollouts):
    """All rows of the enumeration."""

    def __init__(self, monkeypatch, sampling_cfg, most, **how):
        u, volumes = cells(sampling_cfg, most, how.get("model", CFG))
        table = jnp.asarray(u, jnp.float32)

        def keyed(keys, positions, vocab_size, kernels):
            del kernels
            # A request's key is its row of the table.
            row = keys[:, 1].astype(jnp.int32)
            step = jnp.clip(positions - len(PROMPT), 0, most - 1)
            return jnp.broadcast_to(table[row, step][:, None], (len(keys), vocab_size))

        monkeypatch.setattr(noise, "gumbel", keyed)
        monkeypatch.setattr(sampling.Law, "draw", draw_by_distribution)
        super().__init__(sampling_cfg, most, volumes, **how)


@functools.cache
def prefill_program(model=CFG):
    return jax.jit(
        functools.partial(
            decode.prefill, settings=decode.Settings(model, feature_layers=())
        )
    )


def total_variation(law, other):
    keys = {*law, *other}
    return 0.5 * sum(abs(law.get(k, 0.0) - other.get(k, 0.0)) for k in keys)


CHAIN = strategy_lib.Strategy(3, 1, 4)
TREE = strategy_lib.Strategy(3, 2, 8)
SINGLE = strategy_lib.Strategy(1, 2, 3)
# Rows of the enumeration share: guesses of one decide what is read of another.
TIGHT = strategy_lib.Strategy(3, 2, 8, budget=3)  # nodes a row on average
WIDE = strategy_lib.Strategy(1, 3, 4)


@pytest.mark.parametrize(
    "sampling_cfg,most,strategies,limit,how",
    [
        (LAW, 4, (None,), LONGEST, {}),
        (LAW, 4, (CHAIN,), LONGEST, {}),
        (LAW, 4, (TREE,), LONGEST, {}),
        (LAW, 4, (WIDE, None, TREE), 1, {}),
        (TRUNCATED, 5, (TREE,), 3, {}),
        (LAW, 4, (TIGHT,), LONGEST, {}),
        (LAW, 4, (SINGLE, TIGHT), 2, {}),
        (LAW, 4, (CHAIN, None, TREE), 3, dict(cfg=BLOCK)),
        (TRUNCATED, 4, (SINGLE, TIGHT), 2, dict(cfg=BLOCK)),
        (LAW, 4, (WIDE, None, TREE), 2, dict(model=MIXTURE)),
        (TRUNCATED, 4, (SINGLE, TIGHT), 2, dict(model=MIXTURE)),
    ],
    ids="plain chain tree switching truncated shared switching_shared "
    "block block_shared mixture mixture_shared".split(),
)
def test_the_law_is_the_targets(
    monkeypatch, sampling_cfg, most, strategies, limit, how
):
    law = Case(monkeypatch, sampling_cfg, most, **how).law(strategies, limit)
    assert abs(sum(law.values()) - 1) < 1e-9
    wanted = whole_law(sampling_cfg, most, how.get("model", CFG))
    assert total_variation(law, wanted) < 1e-6


def test_texts_of_the_mixture_go_through_all_experts_by_several_routes():
    routes = [tuple(own.flatten()) for _, own in outputs_of(MIXTURE).values()]
    assert {*sum(routes, ())} == {0, 1, 2, 3}
    assert len({tuple(sorted(own)) for own in routes}) >= 4


def test_a_node_that_takes_anothers_route_shows_in_the_law(monkeypatch):
    case = Case(monkeypatch, LAW, 3, model=MIXTURE)
    choose = experts._choose
    monkeypatch.setattr(
        experts, "_choose", lambda probs, count: jnp.roll(choose(probs, count), 1, 2)
    )
    law = case.law((TREE,))
    assert total_variation(law, whole_law(LAW, 3, MIXTURE)) > 1e-3


MUTATIONS = {
    "EOS dropped from the completion": (
        "jnp.minimum(count_B, first_eos_B + 1)",
        "jnp.minimum(count_B, first_eos_B)",
    ),
    "tokens behind EOS kept": (
        "jnp.where(alive, jnp.minimum(count_B, first_eos_B + 1), 0)",
        "jnp.where(alive, count_B, 0)",
    ),
    "limit passed inside an accepted run": (
        "jnp.minimum(rows.remaining, token_limit) - state.emitted.counts",
        "jnp.full_like(rows.remaining, most)",
    ),
    "every node at the root's position": (
        "rows.lengths[:, None] + tree.depths",
        "rows.lengths[:, None] + 0 * tree.depths",
    ),
    "nodes see other branches": (
        "mask_BWW = tree_lib.unpack_words(words, tree.tokens.shape[1])",
        "mask_BWW = jnp.ones((len(words), *[tree.tokens.shape[1]] * 2), bool)",
    ),
    "first columns appended, not the path": (
        "        sources=path,\n",
        "",
    ),
}
# Of rows that share.
IN_THE_SHARE = {
    "a row's columns taken for another's": (
        "path_BA = ragged_rows.columns(walk.path)",
        "path_BA = ragged_rows.columns(walk.path)[::-1]",
    ),
    "positions of equal rows": (
        "map(ragged_rows.pack, (tokens, positions))",
        "ragged_rows.pack(tokens), positions.reshape(1, -1)[:, : len(rows.keys) * 3]",
    ),
    "a node more than the row has": (
        "ragged.of_counts(counts_B, width, budget)",
        "ragged.of_counts(jnp.minimum(counts_B + 1, width), width, budget)",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_error_in_the_step_shows_in_the_law(monkeypatch, name):
    case = Case(monkeypatch, LAW, 3)
    case.run = mutation.mutate(speculate, *MUTATIONS[name]).run
    # What one step caches shows in the next.
    strategies, limit = (SINGLE, TREE), 2
    if "appended" not in name:
        strategies, limit = (TREE,), LONGEST
    law = case.law(strategies, limit)
    assert total_variation(law, whole_law(LAW, 3)) > 1e-3


@pytest.mark.parametrize("name", IN_THE_SHARE)
def test_an_error_in_the_share_shows_in_the_law(monkeypatch, name):
    case = Case(monkeypatch, LAW, 3)
    case.run = mutation.mutate(speculate, *IN_THE_SHARE[name]).run
    law = case.law((TIGHT,), 2)
    assert total_variation(law, whole_law(LAW, 3)) > 1e-3


IN_THE_RULE = {
    "one key for all steps": (
        "lengths[:, None] + 1 + jnp.arange(num)",
        "0 * lengths[:, None] + 3 + jnp.zeros_like(jnp.arange(num))",
    ),
    "one key for all prompts": (
        "jnp.repeat(keys, num, axis=0)",
        "jnp.repeat(keys[:1], num * batch, axis=0)",
    ),
    "noise of the next position": ("lengths[:, None] + 1 +", "lengths[:, None] + 2 +"),
    "drafted token taken, not the target's": (
        "drawn_BW = law.draw(noise_BAV, which, settings.kernels)",
        "drawn_BW = jnp.roll(tree.tokens, -1, axis=1)",
    ),
    "another node's child accepted": (
        "is_child & (tree.parents == node[:, None])",
        "is_child",
    ),
    "the root's noise at every depth": (
        "law.draw(noise_BAV, which,",
        "law.draw(noise_BAV, 0 * which,",
    ),
}


@pytest.mark.parametrize("name", IN_THE_RULE)
def test_an_error_in_the_rule_shows_in_the_law(monkeypatch, name):
    case = Case(monkeypatch, LAW, 3)
    case.rule = mutation.mutate(verify, *IN_THE_RULE[name]).Keyed()
    law = case.law((TREE,))
    assert total_variation(law, whole_law(LAW, 3)) > 1e-3


def test_another_order_of_temperature_and_top_p_shows_in_the_law(monkeypatch):
    case = Case(monkeypatch, TRUNCATED, 3)
    true_law = sampling.law

    def mutated(logits, cfg):
        kept = true_law(logits, sampling.SamplingConfig(top_p=cfg.top_p)).scores
        return true_law(kept, sampling.SamplingConfig(temperature=cfg.temperature))

    monkeypatch.setattr(sampling, "law", mutated)
    law = case.law((TREE,))
    assert total_variation(law, whole_law(TRUNCATED, 3)) > 1e-3
