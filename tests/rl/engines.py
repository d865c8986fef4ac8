"""Engines of a tiny random model, and requests for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models import transformer
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.runtime import sharding
from tlt_jax.specdec import noise, sampling

EOS = 2
CFG = model_config.ModelConfig(
    family="llama",
    vocab_size=32,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    tie_embeddings=False,
    eos_ids=(EOS,),
)
BASE = engine_programs.EngineConfig(
    max_rows=4,
    max_length=40,
    page_size=4,
    steps_per_call=5,
    prefill_chunk=8,
    eos_ids=(EOS,),
)
# A batch that is no power of two, and so few pages that rows are put back.
SMALL = dict(max_rows=3, page_size=2, num_pages=26, steps_per_call=3, prefill_chunk=3)
ONE_ROW = dict(max_rows=1, page_size=16, steps_per_call=32, prefill_chunk=1)
SEED = 5
# Lengths of prompts: one token alone; cached part of exactly a page, of two chunks; a
# whole number of pages with its last token; others. Each with its completion limits.
GROUPS = {
    1: (1, 24),
    4: (20,),
    5: (17, 1),
    9: (9, 24, 24),
    17: (20, 2),
    14: (24, 24),
}


def params_of(seed, dtype=np.float32):
    """Draw weights with NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(weight):
        noise = rng.normal(size=weight.shape) * weight.fan_in**-0.5
        return (1 + 0.3 * noise if weight.init == "ones" else noise).astype(dtype)

    drawn = jax.tree.map(draw, model_params.describe(CFG))
    return jax.tree.map(jnp.asarray, model_params.unstack(drawn))


PARAMS = params_of(0)


def requests_of(groups=GROUPS):
    """Make a request per limit; ids are neither in order nor dense."""
    rng = np.random.default_rng(1)
    requests = []
    for prompt_id, (length, limits) in enumerate(groups.items()):
        prompt = rng.integers(3, CFG.vocab_size, length).astype(np.int32)
        for sample, limit in enumerate(limits):
            request_id = (1 << 40) - 7 * len(requests)
            requests.append(
                types.Request(request_id, 50 + prompt_id, sample, prompt, limit)
            )
    return requests


REQUESTS = requests_of()


def letters(tokens):
    """Decode as a tokenizer with one, two or no characters a token would."""
    return "".join("" if t == EOS else chr(64 + t) * (1 + t % 2) for t in tokens)


def engine_of(pool=None, params=PARAMS, mesh=None, decode_text=letters, **changes):
    """Make an engine; `pool` is that of one whose programs are the same."""
    engine = engine_lib.Engine(
        CFG, dataclasses.replace(BASE, **changes), decode_text=decode_text, mesh=mesh
    )
    if pool is not None:
        engine.pool.close()
        engine.pool = pool
    engine.set_params(params, version=0)
    return engine


def split(mesh):
    """The weights over the devices of `mesh`."""
    axes = model_params.logical_axes(CFG)
    of_layer = jax.tree.map(lambda a: a[1:], axes.layers, is_leaf=sharding.is_axes)
    axes = axes.replace(layers=(of_layer,) * CFG.num_layers)
    rules = sharding.ShardingRules()
    return jax.device_put(PARAMS, sharding.tree_shardings(mesh, rules, axes))


@jax.jit
def full_logits(params, text):
    """Logits `[n, V]` behind every token of `text [n]`, without a cache."""
    positions = jnp.arange(text.shape[0])[None]
    out = transformer.forward(params, CFG, text[None], positions)
    return transformer.logits(params, out.hidden)[0]


def padded(text):
    return np.pad(np.asarray(text, np.int32), (0, BASE.max_length - len(text)))


gumbel = jax.jit(noise.gumbel, static_argnums=2)
law_of = jax.jit(sampling.law, static_argnums=1)


def slow(request, law_cfg=BASE.sampling_cfg):
    """Complete by a full forward for every token: tokens and reason."""
    text = request.prompt.tolist()
    keys = noise.request_keys(SEED, [request.request_id] * BASE.max_length)
    noise_SV = gumbel(keys, np.arange(BASE.max_length), CFG.vocab_size)
    for position in range(len(text), len(text) + request.max_new_tokens):
        scores_SV = law_of(full_logits(PARAMS, padded(text)), law_cfg).scores
        scores = np.asarray(scores_SV)[position - 1] + np.asarray(noise_SV)[position]
        text.append(int(np.argmax(scores)))
        if text[-1] == EOS:
            return text[len(request.prompt) :], "eos"
    return text[len(request.prompt) :], "length"


def exact_logprobs(request, completion, law_cfg=BASE.sampling_cfg):
    """Logprobs of a completion's tokens by one full forward and NumPy."""
    text = np.concatenate([request.prompt, completion.tokens])
    law = law_of(full_logits(PARAMS, padded(text)), law_cfg)
    first = len(request.prompt) - 1
    rows = np.arange(first, first + len(completion.tokens))
    scores = np.asarray(law.scores, np.float64)
    logprobs = scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
    return logprobs[rows, completion.tokens]
