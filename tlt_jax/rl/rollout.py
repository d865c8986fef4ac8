"""The rollout engine: continuous batching over compiled decode programs.

Rows are admitted into free slots, decoded many steps a call, retired when they end, and
packed into the next smaller batch bucket as the batch drains. Tokens do not depend on
any of this: noise is keyed by request and position.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import sharding, types
from tlt_jax.models import config as model_config
from tlt_jax.models import kv_cache
from tlt_jax.models import params as model_params
from tlt_jax.rl import scheduler
from tlt_jax.specdec import decode, noise, programs, sampling

# Prompts prefilled by one call, at most; buckets are the powers of two up to it.
_PREFILL_ROWS = 4


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes and law of an engine.

    Attributes:
      max_rows: rows decoded at once.
      max_length: longest text in positions, prompt and completion.
      page_size: positions in a page.
      num_pages: of the cache, scratch page included; 0: enough for `max_rows` rows of
        `max_length`.
      steps_per_call: decode steps of one device program call.
      prefill_chunk: prompt positions of one prefill call; rounded up to whole pages.
      sampling_cfg: the law.
      eos_ids: tokens that end a completion; they are kept.
      stop: strings that end a completion; the token that completes one is kept.
      dtype: of activations and cache.
    """

    max_rows: int
    max_length: int
    page_size: int = 64
    num_pages: int = 0
    steps_per_call: int = 32
    prefill_chunk: int = 128
    sampling_cfg: sampling.SamplingConfig = sampling.SamplingConfig()
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def max_pages(self) -> int:
        """Pages of the longest row."""
        return -(-self.max_length // self.page_size)

    @property
    def total_pages(self) -> int:
        """Pages of the cache, scratch page included."""
        return self.num_pages or 1 + self.max_rows * (self.max_pages + 1)

    @property
    def chunk(self) -> int:
        """Positions of one prefill call."""
        return -(-self.prefill_chunk // self.page_size) * self.page_size


@dataclasses.dataclass
class RolloutStats:
    """What a run of the engine did.

    Attributes:
      num_tokens: drawn and kept.
      num_steps: target forwards of decode calls.
      num_row_steps: the same times the batch bucket.
      num_calls: decode calls.
      num_prefill_tokens: prompt positions computed.
      num_preempted: rows put back for want of pages.
      prefill_s, decode_s: seconds on the host's clock, waiting for the device; no
        compilation.
      compile_s: seconds for which programs were waited for.
      active_rows: rows alive at the start of each decode call.
      call_s: seconds of each decode call.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_row_steps: int = 0
    num_calls: int = 0
    num_prefill_tokens: int = 0
    num_preempted: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0
    active_rows: list[int] = dataclasses.field(default_factory=list)
    call_s: list[float] = dataclasses.field(default_factory=list)


class Engine:
    """Generates completions with one copy of the target on one mesh."""

    def __init__(
        self,
        cfg: model_config.ModelConfig,
        engine_cfg: EngineConfig,
        *,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: sharding.ShardingRules | None = None,
    ):
        """Make an engine without weights; `set_params` gives it some.

        Args:
          cfg: the target.
          engine_cfg: sizes and law.
          decode_text: token ids to text; needed for stop strings.
          mesh: devices of this engine; None: the first device.
          rules: how the cache is split over the mesh.

        Raises:
          ValueError: stop strings without `decode_text`.
        """
        if engine_cfg.stop and decode_text is None:
            raise ValueError(
                f"stop={engine_cfg.stop} needs decode_text, the tokenizer's decode."
            )
        self.cfg = cfg
        self.engine_cfg = engine_cfg
        self.pool = programs.ProgramPool()
        self.version = -1
        self._decode_text = decode_text
        self.mesh = mesh or sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        rules = rules or sharding.ShardingRules()
        self._replicated = sharding.replicated(self.mesh)
        abstract = jax.eval_shape(self._empty_cache)
        axes = (None, "page", "kv_heads", None, None)
        self._cache_sharding = sharding.named(
            self.mesh, rules, axes, abstract.keys.shape
        )
        self._cache_abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=self._cache_sharding
            ),
            abstract,
        )
        self._cache = None
        self._params = None

    @property
    def params(self) -> model_params.Params | None:
        """The weights in use."""
        return self._params

    def release_cache(self) -> None:
        """Free the cache's memory until the next run."""
        self._cache = None

    def set_params(self, params: model_params.Params, version: int) -> None:
        """Use these weights from the next run on.

        Args:
          params: on the engine's mesh; a tuple of layers decodes fastest on CPUs.
          version: counts the policy's updates.
        """
        self._params = params
        self.version = version

    def warm_up(self, wait: bool = True) -> None:
        """Compile every program that any run may need, those needed first, first.

        Args:
          wait: return when all are ready; else they are compiled in the background.
        """
        self._require_params()
        self.pool.prepare(*self._cache_program())
        for rows in scheduler.buckets(_PREFILL_ROWS):
            self.pool.prepare(*self._prefill_program(rows))
        self.pool.prepare(*self._copy_program())
        for bucket in reversed(scheduler.buckets(self.engine_cfg.max_rows)):
            self.pool.prepare(*self._decode_program(bucket))
        if wait:
            self.pool.wait()

    def run(
        self,
        requests: Sequence[types.Request],
        seed: int,
        *,
        expected_lengths: Mapping[int, float] | None = None,
        on_completion: Callable[[types.Completion], None] | None = None,
        on_call: Callable[[int, int], None] | None = None,
    ) -> tuple[list[types.Completion], RolloutStats]:
        """Generate a completion for every request.

        Args:
          requests: ids distinct; prompts of equal `prompt_id` equal.
          seed: of the noise.
          expected_lengths: tokens by `prompt_id`; the longest are started first.
          on_completion: called with each completion as soon as it is there.
          on_call: called after each decode call with completions done, and tokens.

        Returns:
          Completions in the order of the requests, and what was done.

        Raises:
          ValueError: a request is empty, does not fit, its id is not unique, or its
            prompt is not that of its `prompt_id` or not of the vocabulary.
        """
        self._require_params()
        self._check(requests)
        engine_cfg = self.engine_cfg
        stats = RolloutStats()
        waited_before = self.pool.stats.waited_s
        plan = scheduler.Scheduler(
            requests,
            num_pages=engine_cfg.total_pages,
            page_size=engine_cfg.page_size,
            max_rows=engine_cfg.max_rows,
            expected_lengths=expected_lengths,
        )
        keys = dict(
            zip(
                (r.request_id for r in requests),
                noise.request_keys(seed, [r.request_id for r in requests]),
                strict=True,
            )
        )
        done: dict[int, types.Completion] = {}
        if self._cache is None:
            self._cache = self.pool.get(*self._cache_program())()
        while plan.waiting or plan.rows:
            self._admit(plan, stats)
            for completion in self._decode_call(plan, keys, stats):
                done[completion.request_id] = completion
                stats.num_tokens += len(completion.tokens)
                if on_completion:
                    on_completion(completion)
            if on_call:
                alive = sum(len(row.tokens) for row in plan.rows)
                on_call(len(done), stats.num_tokens + alive)
        stats.num_preempted = plan.num_preempted
        stats.compile_s = self.pool.stats.waited_s - waited_before
        return [done[request.request_id] for request in requests], stats

    def _admit(self, plan: scheduler.Scheduler, stats: RolloutStats) -> None:
        """Admit waiting rows; cache their prompts."""
        admission = plan.admit(self.engine_cfg.steps_per_call)
        if not admission.any():
            return
        started, waited = time.perf_counter(), self.pool.stats.waited_s
        for jobs in (admission.prompts, admission.returns):
            for first in range(0, len(jobs), _PREFILL_ROWS):
                self._prefill(jobs[first : first + _PREFILL_ROWS], stats)
        width = self.engine_cfg.max_rows
        pairs = np.zeros((width, 2), np.int32)
        pairs[: len(admission.copies)] = np.reshape(admission.copies, (-1, 2))
        copy = self.pool.get(*self._copy_program())
        self._cache = copy(self._cache, pairs[:, 0], pairs[:, 1])
        # Else the next decode call would count what is still being computed.
        jax.block_until_ready(self._cache)
        waited = self.pool.stats.waited_s - waited
        stats.prefill_s += time.perf_counter() - started - waited

    def _prefill(self, jobs: list[scheduler.Prefill], stats: RolloutStats) -> None:
        chunk = self.engine_cfg.chunk
        batch = scheduler.bucket_of(len(jobs), _PREFILL_ROWS)
        program = self.pool.get(*self._prefill_program(batch))
        table = np.zeros((batch, self.engine_cfg.max_pages), np.int32)
        for i, job in enumerate(jobs):
            table[i, : len(job.pages)] = job.pages
        for offset in range(0, max(len(j.text) - j.start for j in jobs), chunk):
            tokens = np.zeros((batch, chunk), np.int32)
            counts = np.zeros((batch,), np.int32)
            lengths = np.zeros((batch,), np.int32)
            for i, job in enumerate(jobs):
                part = job.text[job.start + offset :][:chunk]
                tokens[i, : len(part)] = part
                counts[i] = len(part)
                # A row that is through reads nothing and writes to the scratch page.
                lengths[i] = job.start + offset if len(part) else 0
            self._cache = program(
                self._params, self._cache, tokens, counts, table, lengths
            )
            stats.num_prefill_tokens += int(counts.sum())

    def _decode_call(
        self, plan: scheduler.Scheduler, keys: Mapping[int, np.ndarray], stats
    ) -> list[types.Completion]:
        """Decode once for all rows; return the completions that ended."""
        cfg = self.engine_cfg
        rows = list(plan.rows)
        batch = scheduler.bucket_of(len(rows), cfg.max_rows)
        inputs = decode.Rows(
            page_table=plan.page_table(rows, batch, cfg.max_pages),
            lengths=_padded([row.length for row in rows], batch),
            pending=_padded([row.pending for row in rows], batch),
            keys=_padded([keys[r.request.request_id] for r in rows], batch, np.uint32),
            remaining=_padded([row.remaining for row in rows], batch),
        )
        quota = scheduler.finish_quota(len(rows), len(plan.waiting), cfg.max_rows)
        program = self.pool.get(*self._decode_program(batch))
        started = time.perf_counter()
        self._cache, emitted = program(
            self._params,
            self._cache,
            inputs,
            np.int32(cfg.steps_per_call),
            np.int32(quota),
        )
        emitted = jax.device_get(emitted)
        elapsed = time.perf_counter() - started
        stats.decode_s += elapsed
        stats.call_s.append(elapsed)
        stats.active_rows.append(len(rows))
        stats.num_calls += 1
        stats.num_steps += int(emitted.num_steps)
        stats.num_row_steps += int(emitted.num_steps) * batch

        completions = []
        for i, row in enumerate(rows):
            count = int(emitted.counts[i])
            row.tokens.extend(emitted.tokens[i, :count].tolist())
            row.logprobs.extend(emitted.logprobs[i, :count].tolist())
            row.length += count
            reason = self._finish_reason(row, count, bool(emitted.ended[i]))
            if reason:
                plan.finish(row)
                completions.append(
                    types.Completion(
                        row.request.request_id,
                        np.asarray(row.tokens, np.int32),
                        np.asarray(row.logprobs, np.float32),
                        reason,
                    )
                )
        return completions

    def _finish_reason(
        self, row: scheduler.Row, num_new: int, ended: bool
    ) -> types.FinishReason | None:
        """Say why a row is finished, if it is; cut it behind a stop string."""
        length = self._stop_length(row.tokens, num_new)
        if length is not None and not (ended and length == len(row.tokens)):
            del row.tokens[length:], row.logprobs[length:]
            return "stop"
        if ended:
            return "eos"
        return None if row.remaining else "length"

    def _stop_length(self, tokens: list[int], num_new: int) -> int | None:
        """Return after how many tokens a stop string first stands in the text."""
        stop = self.engine_cfg.stop
        if not stop or not any(s in self._decode_text(tokens) for s in stop):
            return None
        for length in range(len(tokens) - num_new + 1, len(tokens) + 1):
            if any(s in self._decode_text(tokens[:length]) for s in stop):
                return length
        return len(tokens)

    def _check(self, requests: Sequence[types.Request]) -> None:
        if not requests:
            raise ValueError("requests is empty: give at least one.")
        ids = [request.request_id for request in requests]
        if len(set(ids)) < len(ids):
            raise ValueError("requests contain a request_id twice: ids key the noise.")
        prompts = {}
        for request in requests:
            prompt = prompts.setdefault(request.prompt_id, request.prompt)
            if not np.array_equal(prompt, request.prompt):
                raise ValueError(
                    f"request {request.request_id} has another prompt than an earlier "
                    f"one of prompt_id={request.prompt_id}: they share its pages, so "
                    "give different prompts different ids."
                )
            if np.any((request.prompt < 0) | (request.prompt >= self.cfg.vocab_size)):
                raise ValueError(
                    f"request {request.request_id} has a prompt token outside the "
                    f"vocabulary of {self.cfg.vocab_size}: encode it with the model's "
                    "own tokenizer."
                )
            longest = len(request.prompt) + request.max_new_tokens
            if request.max_new_tokens < 1:
                raise ValueError(
                    f"request {request.request_id} asks for max_new_tokens="
                    f"{request.max_new_tokens}: at least 1."
                )
            if longest > self.engine_cfg.max_length:
                raise ValueError(
                    f"request {request.request_id} has a prompt of "
                    f"{len(request.prompt)} tokens and asks for up to "
                    f"{request.max_new_tokens} more, but the engine was made for "
                    f"{self.engine_cfg.max_length} in all: shorten it or raise "
                    "task.max_prompt_tokens."
                )

    def _require_params(self) -> None:
        if self._params is None:
            raise ValueError("the engine has no weights: call set_params first.")

    def _empty_cache(self) -> kv_cache.PagedCache:
        return kv_cache.create(
            self.cfg,
            self.engine_cfg.total_pages,
            self.engine_cfg.page_size,
            jnp.dtype(self.engine_cfg.dtype),
        )

    def _cache_program(self):
        def lower():
            return jax.jit(
                self._empty_cache, out_shardings=self._cache_sharding
            ).lower()

        return ("cache",), lower

    def _decode_program(self, batch: int):
        def lower():
            cfg = self.engine_cfg
            fn = functools.partial(
                decode.decode,
                cfg=self.cfg,
                sampling_cfg=cfg.sampling_cfg,
                eos_ids=cfg.eos_ids,
                max_steps=cfg.steps_per_call,
                dtype=jnp.dtype(cfg.dtype),
            )
            rows = decode.Rows(
                page_table=self._ints(batch, cfg.max_pages),
                lengths=self._ints(batch),
                pending=self._ints(batch),
                keys=self._ints(batch, 2, dtype=jnp.uint32),
                remaining=self._ints(batch),
            )
            return decode.donated(fn, self._cache_sharding, self._replicated).lower(
                self._params_abstract(),
                self._cache_abstract,
                rows,
                self._ints(),
                self._ints(),
            )

        return ("decode", batch), lower

    def _prefill_program(self, batch: int):
        def lower():
            cfg = self.engine_cfg
            fn = functools.partial(
                decode.prefill, cfg=self.cfg, dtype=jnp.dtype(cfg.dtype)
            )
            return decode.donated(fn, self._cache_sharding).lower(
                self._params_abstract(),
                self._cache_abstract,
                self._ints(batch, cfg.chunk),
                self._ints(batch),
                self._ints(batch, cfg.max_pages),
                self._ints(batch),
            )

        return ("prefill", batch), lower

    def _copy_program(self):
        def lower():
            width = self.engine_cfg.max_rows
            fn = jax.jit(
                kv_cache.copy_pages,
                donate_argnums=(0,),
                out_shardings=self._cache_sharding,
            )
            return fn.lower(self._cache_abstract, self._ints(width), self._ints(width))

        return ("copy",), lower

    def _params_abstract(self) -> model_params.Params:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            self._params,
        )

    def _ints(self, *shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)


def _padded(values: list, batch: int, dtype=np.int32) -> np.ndarray:
    """Stack one value per row and fill up with zeros, `[batch, ...]`."""
    array = np.asarray(values, dtype)
    padding = [(0, batch - len(values))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, padding)
