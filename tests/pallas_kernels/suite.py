"""What every implementation is held to, on the shared arguments."""

import functools
import os

import jax
import numpy as np

from tlt_jax.pallas_kernels.verify_attention import api, arg_specs, page_layout

INTERPRETED = {
    "mosaic_tpu": api.Implementation("mosaic_tpu", interpret=True),
    "triton_gpu": api.Implementation("triton_gpu", interpret=True),
}
REFERENCE = api.Implementation("reference")
TREE = arg_specs.by_name("tree")
# Pages of 64 slots and 16 features, so that pages are packed in twos.
SIMULATED = arg_specs.ArgSpec(
    "simulated", (300, 0, 33), 2, num_kv=1, head_dim=16, page_size=64, window=290
)
# For programs that run once, on a CPU: compiling them is what takes time.
QUICKLY = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(
    jax.jit,
    compiler_options=QUICKLY if os.environ["JAX_PLATFORMS"] == "cpu" else None,
)


@functools.cache
def program(spec, implementation, log, packing=1):
    return quick_jit(
        functools.partial(
            api.verify_attention,
            scale=spec.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
            packing=packing,
            with_log_normaliser=log,
            implementation=implementation,
        )
    )


def run(spec, implementation, arguments, log=True, packing=1):
    """Output `[B, K, G, T, H]` and log normalisers in float32."""
    compiled = program(spec, implementation, log, packing)
    out, log_normaliser = compiled(**arguments)
    return np.asarray(out, np.float32), log_normaliser


def packed(spec, arguments, packing):
    """The same arguments with pages as a cache for TPUs holds them."""
    room = page_layout.padded(spec.head_dim, packing) - spec.head_dim
    made = arguments.copy()
    for pages in ("cache_keys", "cache_values"):
        more = np.pad(arguments[pages], [(0, 0)] * 3 + [(0, room), (0, 0)])
        made[pages] = page_layout.pack(more, packing)
    return made


def mask_of(words, num_tokens):
    """Unpack words bit by bit."""
    mask = np.zeros((*words.shape[:-1], num_tokens), bool)
    for s in range(num_tokens):
        mask[..., s] = (words[..., s // 32] >> (s % 32)) & 1
    return mask


def expected(spec, arguments):
    """The twin: one query at a time over the keys that it sees, in float64."""
    a = {k: np.asarray(v, np.float64) for k, v in arguments.items() if k != "words"}
    out = np.zeros(spec.query_shape)
    logs = np.full(spec.query_shape[:4], -1e30)
    causal = np.tril(np.ones((spec.num_tokens, spec.num_tokens), bool))
    for b, length in enumerate(spec.lengths):
        mask = causal
        if spec.kind == "tree":
            mask = mask_of(arguments["words"][b], spec.num_tokens)
        slots = np.arange(length)
        pages = arguments["page_table"][b, slots // spec.page_size]
        past = [
            a[f"cache_{name}"][-1, pages, :, :, slots % spec.page_size]
            for name in ("keys", "values")
        ]
        at = np.concatenate([slots, a["positions"][b]])
        for k, t in np.ndindex(spec.num_kv, spec.num_tokens):
            seen = np.concatenate([np.ones(length, bool), mask[t]])
            if spec.window is not None:
                seen &= a["positions"][b, t] - at < spec.window
            keys, values = (
                np.concatenate([old[:, k], a[name][b, k].T])[seen]
                for old, name in zip(past, ("keys", "values"), strict=True)
            )
            scores = a["query"][b, k, :, t] @ keys.T * spec.scale
            if spec.soft_cap is not None:
                scores = np.tanh(scores / spec.soft_cap) * spec.soft_cap
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            normaliser = weights.sum(axis=1)
            out[b, k, :, t] = weights @ values / normaliser[:, None]
            logs[b, k, :, t] = scores.max(axis=1) + np.log(normaliser)
    return out, logs


def assert_right(spec, implementation, packing=1):
    arguments = arg_specs.make(spec)
    given = packed(spec, arguments, packing)
    out, logs = run(spec, implementation, given, packing=packing)
    exact, exact_logs = expected(spec, arguments)
    # Weights are rounded to bfloat16, and so is the output.
    tolerance, rounding = (5e-6, 0) if spec.dtype == "float32" else (5e-3, 2**-8)
    np.testing.assert_allclose(out, exact, atol=tolerance, rtol=rounding)
    np.testing.assert_allclose(logs, exact_logs, atol=1e-5, rtol=0)
