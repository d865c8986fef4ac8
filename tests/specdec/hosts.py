"""A least host for decode programs, and the slow loop that they are compared with.

The slow loop computes the whole text anew for every token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.specdec import twins
from tlt_jax.models import config as model_config
from tlt_jax.models import kv_cache, transformer
from tlt_jax.models import params as model_params
from tlt_jax.specdec import decode, noise, sampling

CFG = model_config.ModelConfig(
    family="qwen2",
    vocab_size=61,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    tie_embeddings=False,
    qkv_bias=True,
    sliding_window=6,
    windowed_layers=(True, False),
)
EOS = (7, 50)
SEED = 5
MAX_TOKENS = 32  # of any text
MAX_STEPS = 6  # of one call
PLAIN = sampling.SamplingConfig()
TRUNCATED = sampling.SamplingConfig(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02)
GREEDY = sampling.SamplingConfig(temperature=0)


@dataclasses.dataclass
class Ask:
    """A request, and its text with what was drawn so far."""

    request_id: int
    prompt: np.ndarray
    limit: int
    drawn: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)

    @property
    def text(self):
        return np.array([*self.prompt, *self.drawn], np.int32)

    @property
    def remaining(self):
        ended = bool(self.drawn) and self.drawn[-1] in EOS
        return 0 if ended else self.limit - len(self.drawn)


def asks():
    """Eight requests; the first three have one prompt."""
    rng = np.random.default_rng(3)
    lengths = [10, 10, 10, 1, 5, 4, 9, 12]
    limits = [19, 19, 19, 19, 1, 12, 20, 19]
    prompts = [rng.integers(8, 50, n).astype(np.int32) for n in lengths]
    prompts[1] = prompts[2] = prompts[0]
    ids = [0, 1, 2**40 + 1, 2**32, 17, 4, 5, 900]
    return [Ask(*each) for each in zip(ids, prompts, limits, strict=True)]


@functools.cache
def weights(form="stacked"):
    params = model_params.init(CFG, jax.random.key(1))
    return model_params.unstack(params) if form == "unstacked" else params


@jax.jit
def full_forward(params, texts):
    positions = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
    out = transformer.forward(params, CFG, texts, positions)
    return transformer.logits(params, out.hidden), out.keys, out.values


def padded(texts):
    out = np.zeros((len(texts), MAX_TOKENS), np.int32)
    for row, text in enumerate(texts):
        out[row, : len(text)] = text
    return out


@functools.cache
def reference(sampling_cfg):
    """Every request's tokens and log-probabilities, by the slow loop."""
    rows = asks()
    num = len(rows)
    keys = noise.request_keys(SEED, [ask.request_id for ask in rows])
    gumbel = noise.gumbel(
        np.repeat(keys, MAX_TOKENS, axis=0),
        np.tile(np.arange(MAX_TOKENS, dtype=np.int32), num),
        CFG.vocab_size,
    )
    gumbel = np.asarray(gumbel).reshape(num, MAX_TOKENS, -1)
    while any(ask.remaining for ask in rows):
        logits, *_ = full_forward(weights(), padded([ask.text for ask in rows]))
        for row, ask in enumerate(rows):
            if ask.remaining:
                end = len(ask.text)
                law = twins.law(logits[row, end - 1], **vars(sampling_cfg))
                ask.drawn.append(int(np.argmax(law + gumbel[row, end])))
                ask.logprobs.append(law[ask.drawn[-1]])
    return rows


@functools.cache
def decode_program(sampling_cfg):
    settings = decode.Settings(CFG, sampling_cfg, EOS, MAX_STEPS)
    return decode.donated(functools.partial(decode.decode, settings=settings))


@functools.cache
def prefill_program():
    return decode.donated(
        functools.partial(decode.prefill, settings=decode.Settings(CFG))
    )


class Host:
    """The least that a host must do: slots of a bucket, pages, calls.

    The pages begin as NaN, so that reading a slot before it is written shows.
    """

    def __init__(self, rows, bucket, page_size, form="stacked", share=False, seed=0):
        self.rows, self.bucket, self.page_size = rows, bucket, page_size
        self.params = weights(form)
        max_pages = -(-MAX_TOKENS // page_size)
        num_pages = 1 + bucket * max_pages
        pages = 1 + np.random.default_rng(seed).permutation(num_pages - 1)
        self.table = pages.reshape(bucket, max_pages).astype(np.int32)
        self.table[len(rows) :] = kv_cache.SCRATCH_PAGE
        cache = kv_cache.create(CFG, num_pages, page_size, jnp.float32)
        self.cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
        self.owners = list(range(len(rows)))
        if share:
            for row, ask in enumerate(rows):
                same = [np.array_equal(other.prompt, ask.prompt) for other in rows]
                self.owners[row] = owner = same.index(True)
                full = self.shared_pages(row)
                self.table[row, :full] = self.table[owner, :full]

    @property
    def prefill_program(self):
        return prefill_program()

    def shared_pages(self, row):
        if self.owners[row] == row:
            return 0
        return (len(self.rows[row].prompt) - 1) // self.page_size

    def pad(self, values, dtype=np.int32):
        values = np.asarray(values, dtype)
        out = np.zeros((self.bucket, *values.shape[1:]), dtype)
        out[: len(values)] = values
        return out

    def prefill(self, chunk):
        """All but the last token of each text: that one is pending."""
        owns = [owner == row for row, owner in enumerate(self.owners)]
        for turn in (True, False):
            done = [self.shared_pages(r) * self.page_size for r in range(len(owns))]
            ends = [
                len(ask.text) - 1 if own is turn else 0
                for own, ask in zip(owns, self.rows, strict=True)
            ]
            while any(a < b for a, b in zip(done, ends, strict=True)):
                tokens = np.zeros((len(ends), chunk), np.int32)
                counts = np.clip(np.subtract(ends, done), 0, chunk)
                for row, count in enumerate(counts):
                    piece = self.rows[row].text[done[row] : done[row] + count]
                    tokens[row, :count] = piece
                self.cache = self.prefill_program(
                    self.params,
                    self.cache,
                    self.pad(tokens),
                    self.pad(counts),
                    self.table,
                    self.pad(np.where(counts > 0, done, 0)),
                )
                done = [a + chunk * (c > 0) for a, c in zip(done, counts, strict=True)]

    def inputs(self):
        keys = noise.request_keys(SEED, [ask.request_id for ask in self.rows])
        return decode.Rows(
            page_table=self.table,
            lengths=self.pad([len(ask.text) - 1 for ask in self.rows]),
            pending=self.pad([ask.text[-1] for ask in self.rows]),
            keys=self.pad(keys, np.uint32),
            remaining=self.pad([ask.remaining for ask in self.rows]),
        )

    def call(self, sampling_cfg, step_limit=MAX_STEPS, finish_quota=99):
        """One decode call; checks what holds of every call."""
        inputs = self.inputs()
        before = np.array(self.cache.keys), np.array(self.cache.values)
        self.cache, emitted = decode_program(sampling_cfg)(
            self.params,
            self.cache,
            inputs,
            jnp.int32(step_limit),
            jnp.int32(finish_quota),
        )
        emitted = jax.tree.map(np.asarray, emitted)
        assert emitted.counts.max() == emitted.num_steps <= step_limit
        assert np.all(emitted.counts <= inputs.remaining)
        outside = np.arange(MAX_STEPS) >= emitted.counts[:, None]
        assert not emitted.tokens[outside].any()
        assert not emitted.logprobs[outside].any()

        # Written: the slots of the pending tokens that were fed. Nothing else.
        written = np.zeros((before[0].shape[1], self.page_size), bool)
        for row, count in enumerate(emitted.counts):
            at = inputs.lengths[row] + np.arange(count)
            pages = self.table[row, at // self.page_size]
            written[pages, at % self.page_size] = True
        written[kv_cache.SCRATCH_PAGE] = False
        for old, new in zip(before, (self.cache.keys, self.cache.values), strict=True):
            old, new = (np.moveaxis(x, -1, 2)[:, 1:] for x in (old, np.asarray(new)))
            np.testing.assert_array_equal(new[:, ~written[1:]], old[:, ~written[1:]])
            assert np.all(np.isfinite(new[:, written[1:]]))

        for row, ask in enumerate(self.rows):
            count = emitted.counts[row]
            ask.drawn += emitted.tokens[row, :count].tolist()
            ask.logprobs += emitted.logprobs[row, :count].tolist()
            assert emitted.ended[row] == (count > 0 and ask.drawn[-1] in EOS)
        return emitted

    def shuffle(self, rng):
        order = rng.permutation(len(self.rows))
        self.rows = [self.rows[i] for i in order]
        self.owners = None
        self.table[: len(order)] = self.table[order]

    def check_cache(self):
        """Compare with the columns of a forward over the whole texts."""
        texts = padded([ask.text for ask in self.rows] + [[0]] * (8 - len(self.rows)))
        _, *wanted = jax.device_get(full_forward(weights(), texts))
        for row, ask in enumerate(self.rows):
            length = len(ask.text) - 1
            cached = self.cache.keys, self.cache.values
            for pages, columns in zip(cached, wanted, strict=True):
                own = np.moveaxis(np.asarray(pages)[:, self.table[row]], 1, -2)
                own = own.reshape(*own.shape[:-2], -1)
                np.testing.assert_allclose(
                    own[..., :length], columns[:, :, :, row, :length], atol=1e-5
                )


def assert_equal_to_reference(rows, sampling_cfg):
    wanted = {ask.request_id: ask for ask in reference(sampling_cfg)}
    for ask in rows:
        assert ask.drawn == wanted[ask.request_id].drawn
        np.testing.assert_allclose(
            ask.logprobs, wanted[ask.request_id].logprobs, rtol=0, atol=1e-5
        )
