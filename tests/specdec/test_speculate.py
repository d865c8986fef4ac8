"""Speculative decoding against plain decoding: equal tokens, whatever is drafted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.specdec import hosts, tiny_drafter
from tlt_jax.models import kv_cache, transformer
from tlt_jax.models.drafters import drafter
from tlt_jax.specdec import chain, decode, protocols, speculate
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import build, learned

MAX_TOKENS = 8  # of one call
CHAIN = strategy_lib.Strategy(3, 1, 4)
TREE = strategy_lib.Strategy(4, 3, 9)
WIDE_TREE = strategy_lib.Strategy(2, 5, 24)
SINGLE = strategy_lib.Strategy(1, 2, 3)
# Rows that share: eight of them have 12 nodes of 32, and 20 of 72.
TIGHT_CHAIN = strategy_lib.Strategy(3, 1, 4, budget=12)
TIGHT_TREE = strategy_lib.Strategy(4, 3, 9, budget=20)
EAGLE = drafter.of_target(hosts.CFG, output_norm=False)
FUSED = drafter.of_target(hosts.CFG, feature_layers=(0, 1), draft_vocab_size=40)
BLOCK = dataclasses.replace(FUSED, architecture="block", block_size=4, markov_rank=8)


@functools.cache
def weights(cfg):
    params = drafter.init(cfg, jax.random.key(2))
    if cfg.draft_vocab_size:
        ids = np.random.default_rng(0).permutation(hosts.CFG.vocab_size)
        ids = np.sort(ids[: cfg.draft_vocab_size]).astype(np.int32)
        params = params.replace(draft_ids=jnp.asarray(ids))
    if cfg.block_size:
        params = tiny_drafter.followed(params)
    return learned.weights_of(params, hosts.weights())


def settings_of(cfg, sampling_cfg=hosts.PLAIN, max_tokens=1):
    sizes = hosts.CFG, sampling_cfg, hosts.EOS, max_tokens
    return decode.Settings(*sizes, feature_layers=cfg.feature_layers)


@functools.cache
def program(sampling_cfg, cfg, strategy, ranking, rule="keyed"):
    settings = settings_of(cfg, sampling_cfg, MAX_TOKENS)
    ranking = ranking if rule == "keyed" else learned.SAMPLED
    fn = functools.partial(
        speculate.run,
        proposer=build.build(strategy, settings, cfg, ranking),
        rule=chain.RULES[rule],
        settings=settings,
    )
    return jax.jit(fn, donate_argnums=(1,))


@functools.cache
def plain_program(sampling_cfg, cfg):
    settings = settings_of(cfg, sampling_cfg, hosts.MAX_STEPS)
    return decode.donated(functools.partial(decode.decode, settings=settings))


@functools.cache
def fill_program(cfg):
    return jax.jit(functools.partial(learned.fill, cfg=cfg), donate_argnums=(2,))


@functools.cache
def whole_texts(cfg):
    """Features of the target over whole texts, and the drafter's keys over them."""

    @jax.jit
    def fn(texts):
        positions = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
        out = transformer.forward(
            hosts.weights(), hosts.CFG, texts, positions, features=cfg.feature_layers
        )
        features = transformer.drafter_features(out)
        drafted = drafter.forward(
            weights(cfg).params,
            cfg,
            weights(cfg).embedded(jnp.roll(texts, -1, axis=1), jnp.float32),
            drafter.fuse(weights(cfg).params, cfg, features),
            positions,
        )
        return features, drafted.keys

    return fn


class Host(hosts.Host):
    """Keeps features and the drafter's pages beside the target's."""

    def __init__(self, rows, cfg=EAGLE, ranking="coupled", rule="keyed", **options):
        super().__init__(rows, **options)
        self.drafter_cfg, self.how = cfg, (ranking, rule)
        num_pages, page_size = self.cache.num_pages, self.page_size
        sizes = num_pages, page_size, jnp.float32
        cache = kv_cache.create(hosts.CFG, *sizes, cfg.num_features * hosts.CFG.d_model)
        nan = functools.partial(jax.tree.map, lambda x: jnp.full_like(x, jnp.nan))
        self.cache = nan(cache)
        self.draft_cache = nan(kv_cache.create(cfg.layer, *sizes))
        self.drafted = [0] * len(rows)
        self.num_row_steps = self.num_accepted = 0

    @property
    def prefill_program(self):
        return decode.donated(
            functools.partial(decode.prefill, settings=settings_of(self.drafter_cfg))
        )

    def fill(self, most):
        """Bring the drafter to within `most` positions of the target."""
        chunk = 2 * self.page_size
        for row, ask in enumerate(self.rows):
            length = len(ask.text) - 1
            if 1 <= length - self.drafted[row] <= most:
                continue
            start = self.drafted[row] // self.page_size * self.page_size
            for first in range(start, max(length - 1, 0), chunk):
                count = min(chunk, length - 1 - first)
                tokens = np.zeros((1, chunk), np.int32)
                tokens[0, :count] = ask.text[first + 1 : first + 1 + count]
                self.draft_cache = fill_program(self.drafter_cfg)(
                    weights(self.drafter_cfg),
                    self.cache,
                    self.draft_cache,
                    tokens,
                    np.array([count], np.int32),
                    self.table[row : row + 1],
                    np.array([first], np.int32),
                )
            self.drafted[row] = max(length - 1, 0)

    def plain(self, sampling_cfg):
        self.cache, emitted = plain_program(sampling_cfg, self.drafter_cfg)(
            self.params,
            self.cache,
            self.inputs(),
            jnp.int32(hosts.MAX_STEPS),
            jnp.int32(99),
        )
        self.take(jax.device_get(emitted))

    def take(self, emitted):
        for row, ask in enumerate(self.rows):
            count = emitted.counts[row]
            assert count <= ask.remaining
            ask.drawn += emitted.tokens[row, :count].tolist()
            ask.logprobs += emitted.logprobs[row, :count].tolist()
            assert emitted.ended[row] == (count > 0 and ask.drawn[-1] in hosts.EOS)

    def speculate(self, sampling_cfg, strategy, token_limit=MAX_TOKENS, quota=99):
        most = strategy.max_accept_length
        # Where rows share, the host fills until what is left fits.
        fits = len(self.rows) * most <= strategy.num_columns(self.bucket)
        self.fill(most if fits else 1)
        tokens = np.zeros((len(self.rows), most), np.int32)
        for row, ask in enumerate(self.rows):
            rest = ask.text[self.drafted[row] + 1 :]
            tokens[row, : len(rest)] = rest
        draft = learned.Draft(
            weights(self.drafter_cfg),
            jnp.float32(0.5),
            jnp.float32(1.0),
            self.pad(self.drafted),
            self.pad(tokens),
        )
        caches = protocols.Caches(self.cache, self.draft_cache)
        caches, result = program(sampling_cfg, self.drafter_cfg, strategy, *self.how)(
            self.params,
            caches,
            self.inputs(),
            draft,
            jnp.int32(token_limit),
            jnp.int32(quota),
        )
        self.cache, self.draft_cache = caches.target, caches.drafter
        result = jax.device_get(result)
        emitted = result.emitted
        assert emitted.counts.max(initial=0) <= token_limit
        outside = np.arange(MAX_TOKENS) >= emitted.counts[:, None]
        assert not emitted.tokens[outside].any()
        assert not emitted.logprobs[outside].any()
        assert np.all(np.diff(result.num_accepted) <= 0)
        # A row's step ends with a token that nobody guessed, unless a limit cuts it:
        # rows that are through count no more.
        inside = np.arange(MAX_TOKENS) < emitted.counts[:, None]
        is_last = np.arange(MAX_TOKENS) == emitted.counts[:, None] - 1
        was_cut = result.was_drafted[is_last]
        num_undrafted = np.sum(inside & ~result.was_drafted)
        assert result.num_accepted[0] == num_undrafted + np.sum(was_cut)
        self.take(emitted)
        self.drafted = result.progress[0][: len(self.rows)].tolist()
        self.num_row_steps += int(result.num_accepted[0])
        self.num_accepted += int(result.num_accepted.sum())
        return result

    def check_features(self):
        """Compare with a forward over whole texts, and the drafter's over those."""
        texts = hosts.padded([ask.text for ask in self.rows])
        texts = np.pad(texts, [(0, 8 - len(self.rows)), (0, 0)])
        features, keys = jax.device_get(whole_texts(self.drafter_cfg)(texts))
        kept = np.asarray(self.cache.features)[0, :, 0]
        pages = np.asarray(self.draft_cache.keys)[0]
        for row, ask in enumerate(self.rows):
            length, drafted = len(ask.text) - 1, self.drafted[row]
            own = kept[self.table[row]].swapaxes(0, 1).reshape(len(features), -1)
            np.testing.assert_allclose(
                own[:, :length], features[:, row, :length], atol=1e-5
            )
            own = np.moveaxis(pages[self.table[row]], 0, -2)
            own = own.reshape(*keys.shape[:2], -1)
            np.testing.assert_allclose(
                own[..., :drafted], keys[:, :, row, :drafted], atol=1e-5
            )

    def shuffle(self, rng):
        order = rng.permutation(len(self.rows))
        self.rows = [self.rows[i] for i in order]
        self.drafted = [self.drafted[i] for i in order]
        self.owners = None
        self.table[: len(order)] = self.table[order]


def run(host, sampling_cfg, strategies, token_limits=(MAX_TOKENS,), shuffle=False):
    rng = np.random.default_rng(0)
    i = 0
    while any(ask.remaining for ask in host.rows):
        strategy = strategies[i % len(strategies)]
        if strategy is None:
            host.plain(sampling_cfg)
        else:
            limit = token_limits[i % len(token_limits)]
            host.speculate(sampling_cfg, strategy, limit)
        host.check_cache()
        host.check_features()
        if shuffle:
            host.shuffle(rng)
        i += 1


WIDE = dict(bucket=8, page_size=4)


@pytest.mark.parametrize(
    "sampling_cfg,strategies,options",
    [
        (hosts.PLAIN, (CHAIN,), {}),
        (hosts.PLAIN, (TREE,), dict(cfg=FUSED)),
        (hosts.PLAIN, (WIDE_TREE,), dict(share=True, form="unstacked")),
        (hosts.PLAIN, (TREE,), dict(ranking="deterministic")),
        (hosts.PLAIN, (CHAIN, None, TREE), dict(shuffle=True)),
        (hosts.TRUNCATED, (TREE,), dict(token_limits=(3, 8, 1))),
        (hosts.GREEDY, (SINGLE, TREE), dict(cfg=FUSED)),
        (hosts.PLAIN, (TIGHT_CHAIN,), dict(cfg=FUSED)),
        (hosts.TRUNCATED, (TIGHT_TREE, None), dict(shuffle=True, share=True)),
        (hosts.PLAIN, (TREE, None, CHAIN), dict(cfg=BLOCK, shuffle=True)),
        (hosts.PLAIN, (TIGHT_CHAIN,), dict(cfg=BLOCK, token_limits=(3, 8))),
    ],
    ids="chain tree wide deterministic switching truncated greedy "
    "shared_chain shared_tree block shared_block".split(),
)
def test_tokens_are_those_of_plain_decoding(sampling_cfg, strategies, options):
    options = dict(options)
    how = {k: options.pop(k) for k in ("shuffle", "token_limits") if k in options}
    host = Host(hosts.asks(), **WIDE | options)
    host.prefill(4)
    run(host, sampling_cfg, strategies, **how)
    hosts.assert_equal_to_reference(host.rows, sampling_cfg)
    # Some guesses are right: what is tested is not plain decoding.
    assert host.num_accepted > host.num_row_steps


def test_rows_that_end_within_a_call_give_their_share_to_the_others():
    """From the second step on two of eight rows are left, and have all their drafts."""
    accepted = {}
    for strategy in (CHAIN, TIGHT_CHAIN):
        asks = [
            hosts.Ask(ask.request_id, ask.prompt, 8 if number in (2, 6) else 1)
            for number, ask in enumerate(hosts.asks())
        ]
        host = Host(asks, **WIDE, cfg=FUSED)
        host.prefill(4)
        result = host.speculate(hosts.PLAIN, strategy)
        accepted[strategy] = result.num_accepted.tolist()
    # Only the first step's eight rows had four drafts among them instead of three each.
    assert accepted == {CHAIN: [16, 9, 2, 2], TIGHT_CHAIN: [16, 8, 1, 1]}
