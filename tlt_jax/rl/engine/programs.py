"""The device programs of a rollout engine: what each is compiled for.

A key names a program in the pool; its shapes follow from the key and the engine's
sizes. The number of programs is a sum and not a product: one plain decode program per
batch bucket, one speculative per (bucket, strategy) that the table can choose, and a
few for prefilling, filling the drafter's cache, and copying pages.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax.models import config as model_config
from tlt_jax.models import kernels, kv_cache
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import speculator
from tlt_jax.runtime import programs, sharding
from tlt_jax.specdec import chain, decode, protocols, sampling, speculate
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import build as proposers
from tlt_jax.specdec.proposers import learned, ngram

# Read by a call, of those that a finished text has.
READ_PAGES = 8


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes and law of an engine.

    Attributes:
      max_rows: rows decoded at once.
      max_length: longest text in positions, prompt and completion.
      page_size: positions in a page.
      num_pages: of the cache, scratch page included; 0: enough for `max_rows` rows of
        `max_length`.
      steps_per_call: decode steps of one device program call; tokens of a row, where
        it speculates.
      prefill_chunk: prompt positions of one prefill call; rounded up to whole pages.
      sampling_cfg: the law.
      eos_ids: tokens that end a completion; they are kept.
      stop: strings that end a completion, none of them empty; the token that completes
        one is kept.
      dtype: of activations and cache.
      cpu_kernels: `auto`, `xla` or `native`, see `cpu_kernels.choice`.
      attention: `auto`, `portable` or a kernel, see `models.kernels.choose`.
      check_kernels: check what attention reads by, see `models.kernels.Kernels`.
      keep_routes: of a mixture of experts: completions bring their routes.
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
    cpu_kernels: str = "auto"
    attention: str = "auto"
    check_kernels: bool = False
    keep_routes: bool = False

    def __post_init__(self):
        if "" in self.stop:
            raise ValueError(
                f"stop={self.stop} holds an empty string, which would end every "
                "completion at its first token: leave it out."
            )

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


class EnginePrograms:
    """Lowers the programs of one engine on one mesh.

    Attributes:
      kernels: that they compute with.
      abstract_caches: shapes and shardings of the caches.
      settings: what every program of the target is compiled for.
      captures: texts' features are read for the drafter's training.
    """

    def __init__(
        self,
        cfg: model_config.ModelConfig,
        engine_cfg: EngineConfig,
        speculator_cfg: speculator.SpeculatorConfig | None,
        mesh: jax.sharding.Mesh,
    ):
        """Describe the caches; weights are given to each program's builder.

        Raises:
          ValueError: `engine_cfg.cpu_kernels` or `.attention` cannot be had, or
            `.keep_routes` of a model without experts.
        """
        if engine_cfg.keep_routes and cfg.experts is None:
            raise ValueError("keep_routes=True, but the model has no experts.")
        self._cfg, self._engine_cfg = cfg, engine_cfg
        self._speculator_cfg = speculator_cfg
        self._drafter_cfg = drafter_cfg = speculator_cfg and speculator_cfg.drafter_cfg
        self.captures = speculator_cfg is not None and speculator_cfg.capture
        rules = sharding.ShardingRules()
        self._replicated = sharding.replicated(mesh)
        self._dtype = jnp.dtype(engine_cfg.dtype)
        self.kernels = kernels.choose(
            *(engine_cfg.cpu_kernels, engine_cfg.attention),
            *(mesh, rules, self._dtype),
            checked=engine_cfg.check_kernels,
        )
        if cfg.experts is not None:
            split = kernels.Split(mesh, rules)
            self.kernels = kernels.for_experts(self.kernels, split)
        layers = drafter_cfg and drafter_cfg.feature_layers
        self.settings = decode.Settings(
            cfg=cfg,
            sampling_cfg=engine_cfg.sampling_cfg,
            eos_ids=engine_cfg.eos_ids,
            max_tokens=engine_cfg.steps_per_call,
            feature_layers=layers,
            # Beside what is fused: training needs the last features, too.
            keep_hidden=bool(layers) and self.captures,
            keep_routes=engine_cfg.keep_routes,
            dtype=engine_cfg.dtype,
            kernels=self.kernels,
        )
        abstract = jax.eval_shape(self._empty)
        self._named = functools.partial(sharding.named, mesh, rules)
        axes = protocols.Caches(
            target=kv_cache.logical_axes(abstract.target),
            drafter=drafter_cfg and kv_cache.logical_axes(abstract.drafter),
        )

        def split(leaf, names):
            # A model's one key/value head, or features, may not divide.
            return self._named(names, leaf.shape, replicate=leaf.shape[2] == 1)

        self._shardings = jax.tree.map(split, abstract, axes)
        self.abstract_caches = abstract_of(abstract, self._shardings)

    def _drafter_weights(self, params: model_params.Params) -> learned.DrafterWeights:
        """Describe the drafter's weights, which need not be there yet."""
        cfg = self._drafter_cfg
        size = cfg.draft_vocab_size

        def make(target):
            ids = jnp.zeros((size,), jnp.int32) if size else None
            own = drafter.init(cfg, jax.random.key(0), self._dtype)
            return learned.weights_of(own.replace(draft_ids=ids), target)

        made = jax.eval_shape(make, abstract_of(params))
        placed = abstract_of(made, self._replicated)
        kept = {"embed": abstract_of(params.embed)}
        if not size and not cfg.own_head:
            kept["head"] = abstract_of(params.head)
        return placed.replace(**kept)

    def empty_caches(self) -> programs.Program:
        """Make the empty `protocols.Caches`."""
        jitted = jax.jit(self._empty, out_shardings=self._shardings)
        return programs.Program(("cache",), jitted.lower)

    def prefill(self, params: model_params.Params, batch: int) -> programs.Program:
        """Append a chunk to `batch` rows of the target's cache."""

        def lower():
            return programs.bound(decode.prefill, settings=self.settings).lower(
                lambda fn: decode.donated(fn, self._shardings.target),
                *(abstract_of(params), self.abstract_caches.target),
                *self._chunk(batch),
            )

        return programs.Program(("prefill", batch), lower)

    def decoding(
        self,
        params: model_params.Params,
        batch: int,
        strategy: strategy_lib.Strategy | None,
    ) -> programs.Program:
        """Decode `batch` rows as the strategy says; None: plainly."""

        def plain():
            where = self._shardings.target, self._replicated
            return programs.bound(decode.decode, settings=self.settings).lower(
                lambda fn: decode.donated(fn, *where),
                abstract_of(params),
                self.abstract_caches.target,
                self._rows(batch),
                *(self._ints(), self._ints()),
            )

        def speculative():
            where, bind = (self._shardings, self._replicated), programs.bound
            if strategy.is_external:
                # A record of one's own need not tell whether it equals another.
                bind = bind.__wrapped__
            return bind(
                speculate.run,
                proposer=self._proposer(strategy),
                rule=chain.RULES[self._speculator_cfg.rule_of(strategy)],
                settings=self.settings,
            ).lower(
                lambda fn: decode.donated(fn, *where),
                abstract_of(params),
                self.abstract_caches,
                self._rows(batch),
                self._inputs(params, batch, strategy),
                *(self._ints(), self._ints()),
            )

        if strategy is None:
            return programs.Program(("decode", batch), plain)
        strategy = strategy.of_batch(batch)
        return programs.Program(("speculate", batch, strategy), speculative)

    def _proposer(self, strategy: strategy_lib.Strategy) -> protocols.Proposer:
        cfg = self._speculator_cfg
        ranking = cfg.ranking if cfg.rule == chain.KEYED else learned.SAMPLED
        return proposers.build(strategy, self.settings, cfg.drafter_cfg, ranking)

    def _inputs(
        self,
        params: model_params.Params,
        batch: int,
        strategy: strategy_lib.Strategy,
    ) -> Any:
        """Describe what `speculator.Speculator.inputs` will give."""
        draft = matching = None
        if strategy.drafts:
            draft = learned.Draft(
                weights=self._drafter_weights(params),
                tau=self._ints(dtype=jnp.float32),
                sharpness=self._ints(dtype=jnp.float32),
                lengths=self._ints(batch),
                tokens=self._ints(batch, strategy.max_accept_length),
            )
        if strategy.matches:
            texts = self._speculator_cfg.texts
            num_texts = texts.num_texts(batch)
            matching = ngram.Matching(
                corpus=ngram.Corpus(
                    self._ints(num_texts, self._engine_cfg.max_length),
                    self._ints(num_texts),
                ),
                sources=self._ints(batch, texts.num_sources),
                outcomes=self._ints(texts.longest + 1, 2, dtype=jnp.float32),
            )
        return speculator.paired(draft, matching)

    def fill(self, params: model_params.Params, batch: int) -> programs.Program:
        """Append a chunk to `batch` rows of the drafter's cache."""

        def lower():
            how = {"cfg": self._drafter_cfg, "dtype": self._dtype}
            where = {"donate_argnums": (2,), "out_shardings": self._shardings.drafter}
            return programs.bound(learned.fill, kernels=self.kernels, **how).lower(
                lambda fn: jax.jit(fn, **where),
                self._drafter_weights(params),
                self.abstract_caches.target,
                self.abstract_caches.drafter,
                *self._chunk(batch),
            )

        return programs.Program(("fill", batch), lower)

    def read_features(self) -> programs.Program:
        """Read what `READ_PAGES` keep of features; see `kv_cache.read_feature_pages`.

        Each device gives its part of them, and the host puts them together.
        """
        return self._reading("read_features", kv_cache.read_feature_pages, "feature")

    def read_routes(self) -> programs.Program:
        """Read what they keep of the routes, see `kv_cache.read_route_pages`."""
        return self._reading("read_routes", kv_cache.read_route_pages, None)

    def _reading(
        self, name: str, read: Callable[..., Any], axis: str | None
    ) -> programs.Program:
        def lower():
            pages, cache = self._ints(READ_PAGES), self.abstract_caches.target
            made = jax.eval_shape(read, cache, pages)
            where = [
                self._named((None, axis), leaf.shape, replicate=True) for leaf in made
            ]
            return jax.jit(read, out_shardings=tuple(where)).lower(cache, pages)

        return programs.Program((name,), lower)

    def copy(self) -> programs.Program:
        """Copy up to `max_rows` pages of the target's cache."""

        def lower():
            pages = self._ints(self._engine_cfg.max_rows)
            where = self._shardings.target
            fn = jax.jit(kv_cache.copy_pages, donate_argnums=(0,), out_shardings=where)
            return fn.lower(self.abstract_caches.target, pages, pages)

        return programs.Program(("copy",), lower)

    def _empty(self) -> protocols.Caches:
        drafter_cfg = self._drafter_cfg
        if drafter_cfg is None:
            return protocols.Caches(self._cache(self._cfg), None)
        num_features = drafter_cfg.num_features + self.settings.keep_hidden
        return protocols.Caches(
            target=self._cache(self._cfg, num_features * self._cfg.d_model),
            drafter=self._cache(drafter_cfg.layer),
        )

    def _cache(
        self, model: model_config.ModelConfig, feature_size: int = 0
    ) -> kv_cache.PagedCache:
        """Make a cache as the attention kernel reads it."""
        cfg = self._engine_cfg
        return kv_cache.create(
            model,
            cfg.total_pages,
            cfg.page_size,
            self._dtype,
            feature_size,
            self.kernels.packing(cfg.page_size, model.head_dim),
            keep_routes=cfg.keep_routes and model is self._cfg,
        )

    def _chunk(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Describe tokens, their counts, pages and lengths of some rows' chunks."""
        cfg = self._engine_cfg
        return (
            self._ints(batch, cfg.chunk),
            self._ints(batch),
            self._ints(batch, cfg.max_pages),
            self._ints(batch),
        )

    def _rows(self, batch: int) -> decode.Rows:
        return decode.Rows(
            page_table=self._ints(batch, self._engine_cfg.max_pages),
            lengths=self._ints(batch),
            pending=self._ints(batch),
            keys=self._ints(batch, 2, dtype=jnp.uint32),
            remaining=self._ints(batch),
        )

    def _ints(self, *shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)


def abstract_of(tree: Any, where: Any = None) -> Any:
    """Describe the shape, dtype and sharding of every leaf.

    Args:
      tree: of arrays, numbers or what describes them.
      where: a sharding for all leaves, or a tree of them whose leaves stand at the
        places of `tree`'s or above; None: those that the leaves have.
    """
    if where is None:
        where = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.tree.map(
        lambda leaf, here: jax.ShapeDtypeStruct(
            jnp.shape(leaf), jnp.result_type(leaf), sharding=here
        ),
        tree,
        jax.tree.broadcast(where, tree),
    )
