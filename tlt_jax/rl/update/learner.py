"""The learner: takes optimizer steps on a mesh, exact under gradient accumulation.

A batch arrives as micro-batches of packed rows. Losses are sums with weights made from
the whole batch, so gradients are added up over micro-batches and one optimizer step
follows. What is jitted are pure functions; the `Learner` places, compiles and calls.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from tlt_jax.models import config as model_config
from tlt_jax.models import kernels
from tlt_jax.models import params as model_params
from tlt_jax.rl.update import (
    losses,
    packing,
    policy_gradient,
    routing,
    weights_digest,
)
from tlt_jax.runtime import programs, train_state
from tlt_jax.runtime import sharding as sharding_lib
from tlt_jax.settings import sections
from tlt_jax.specdec import sampling
from tlt_jax.types import Array


def learning_rate(
    cfg: sections.Optimizer, *, num_steps: int, updates_per_step: int
) -> Callable[[Array], Array]:
    """Make the schedule: optimizer steps taken so far to the next one's rate.

    Warm-up rises linearly and its first step is not lost to a rate of 0; a decay
    reaches 0 just after the last step.

    Args:
      cfg: the optimizer's settings; warm-up counts RL steps.
      num_steps: RL steps of the run.
      updates_per_step: optimizer steps in an RL step.

    Returns:
      A function of an int32 count.
    """
    warmup = cfg.warmup_steps * updates_per_step
    decaying = max(num_steps * updates_per_step - warmup, 1)

    def schedule(count):
        rising = jnp.minimum((count + 1) / max(warmup, 1), 1.0)
        done = jnp.clip((count - warmup) / decaying, 0.0, 1.0)
        match cfg.schedule:
            case "linear":
                falling = 1.0 - done
            case "cosine":
                falling = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            case _:
                falling = 1.0
        return cfg.learning_rate * rising * falling

    return schedule


def make_optimizer(
    cfg: sections.Optimizer, *, num_steps: int, updates_per_step: int
) -> optax.GradientTransformation:
    """Make AdamW with global norm clipping and the configured schedule.

    Reference: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019. See
    `learning_rate` for the arguments.
    """
    schedule = learning_rate(
        cfg, num_steps=num_steps, updates_per_step=updates_per_step
    )
    adamw = optax.adamw(
        schedule,
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
    )
    if not cfg.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw)


class Learner:
    """Places state and batches on the mesh, compiles through the pool, takes steps.

    Programs are compiled once per shape of micro-batch. Learners of equal settings on
    one mesh may share a pool.
    """

    def __init__(
        self,
        model: model_config.ModelConfig,
        law: sampling.SamplingConfig,
        cfg: sections.Learner,
        optimizer: sections.Optimizer,
        *,
        num_steps: int,
        precision: str,
        remat: str,
        mesh: jax.sharding.Mesh,
        pool: programs.ProgramPool,
        head_chunk: int = 1024,
        flash: kernels.Flash | None = None,
    ):
        """Prepare shardings and the optimizer; nothing is compiled yet.

        `law` is that which completions were drawn from; `precision` is of activations
        and products, for `remat` see `sections.Model`. The mesh is one of
        `sharding.make_mesh`; each part of the batch on it holds the logits of
        `head_chunk` predictions at once, of which `policy_gradient.ForwardConfig`
        counts those of all parts. With `flash` rows are laid out as it wants them, see
        `models.flash_attention`.

        Raises:
          ValueError: a weight does not divide over the mesh, or settings of mixtures
            of experts are for a model that is none.
        """
        self.mesh = mesh
        self.rules = sharding_lib.ShardingRules()
        chosen = dataclasses.replace(kernels.PORTABLE, training=flash)
        if model.experts is not None:
            split = kernels.Split(mesh, self.rules)
            chosen = kernels.for_experts(chosen, split, trains=True)
        self.forward_cfg = policy_gradient.ForwardConfig(
            model=model,
            law=law,
            dtype=jnp.dtype(precision),
            remat=remat,
            head_chunk=head_chunk * self._num_parts,
            routing=routing.of_settings(cfg, model),
            kernels=chosen,
        )
        self._pool = pool
        settings = dict(
            num_steps=num_steps, updates_per_step=cfg.minibatches * cfg.epochs
        )
        self.optimizer = make_optimizer(optimizer, **settings)
        self._schedule = learning_rate(optimizer, **settings)
        self._rows_per_device = cfg.rows_per_micro_batch
        self._replicated = sharding_lib.replicated(mesh)
        self._key = ("learner", self.forward_cfg, mesh, self.rules)
        self._step_key = (*self._key, optimizer, *settings.values())
        self._state = self._abstract_train_state()
        self._gradient = policy_gradient.Gradient(
            params=self._state.params,
            loss=_placed(jax.ShapeDtypeStruct((), jnp.float32), self._replicated),
        )

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows of a micro-batch: the configured number on every part of the batch."""
        return self._rows_per_device * self._num_parts

    @property
    def _num_experts(self) -> int:
        experts = self.forward_cfg.model.experts
        return 0 if experts is None else experts.num

    @property
    def _num_parts(self) -> int:
        """Parts into which the mesh splits a batch."""
        return sharding_lib.num_parts(self.mesh, self.rules.batch)

    def abstract_state(self) -> train_state.TrainState:
        """Return shapes, dtypes and shardings of the state, as restoring needs them."""
        return self._state

    def init_state(self, params: model_params.Params) -> train_state.TrainState:
        """Place `params` on the mesh as float32 masters, with fresh moments.

        Args:
          params: layers stacked, any float dtype; not changed and not kept.

        Raises:
          ValueError: a shape is not the model's.
        """
        self._check_params(params)

        def start(params):
            params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
            return train_state.begin(params, self.optimizer)

        placed = jax.device_put(params, _shardings(self._state.params))
        dtypes = tuple(str(x.dtype) for x in jax.tree.leaves(placed))
        jitted = jax.jit(start, out_shardings=_shardings(self._state))
        program = programs.Program(
            (*self._step_key, "init", dtypes), lambda: jitted.lower(placed)
        )
        return self._pool.get(program)(placed)

    def logprobs(
        self,
        params: model_params.Params,
        parts: Sequence[packing.Packed],
        routes: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Compute log-probabilities without gradients: the old or reference policy's.

        `params` are float32, placed as the state's; `parts` have `rows_per_micro_batch`
        rows; `routes` are replayed, see `policy_gradient.rows_of`.

        Returns:
          For each part `[rows, M] float32`, for `packing.scatter`; what stands where no
          prediction is has no meaning.
        """
        outputs = []
        for part in parts:
            rows = policy_gradient.rows_of(part, routes, self._num_experts)
            rows = self._place(rows)
            outputs.append(self._pool.get(self._logprobs_program(rows))(params, rows))
        return [np.asarray(x) for x in jax.device_get(outputs)]

    def digest(self, params: model_params.Params) -> str:
        """Digest weights, placed as the state's, to 16 hexadecimal digits."""
        words = self._pool.get(self._digest_program())(params)
        return weights_digest.text(np.asarray(jax.device_get(words)))

    def prepare(
        self,
        batch: policy_gradient.MicroBatch,
        cfg: losses.LossConfig,
        *,
        with_logprobs: bool = False,
    ) -> None:
        """Compile what micro-batches of these shapes need, in the background.

        Their numbers do not matter; `with_logprobs`: `logprobs` will be called as well.
        """
        rows, columns = self._place(batch.rows), self._place(batch.columns)
        wanted = [self._accumulate_program(rows, columns, cfg, batch.num_sequences)]
        if with_logprobs:
            bare = rows.replace(share=None)
            wanted.append(self._logprobs_program(bare.replace(routes=None)))
            if rows.routes is not None and self.forward_cfg.routing.replay:
                wanted.append(self._logprobs_program(bare))
        wanted += [self._zeros_program(), self._apply_program(), self._digest_program()]
        for program in wanted:
            self._pool.prepare(program)

    def update(
        self,
        state: train_state.TrainState,
        micro_batches: Sequence[policy_gradient.MicroBatch],
        cfg: losses.LossConfig,
    ) -> tuple[train_state.TrainState, dict[str, float], list[np.ndarray]]:
        """Take one optimizer step on the sum of the micro-batches' losses.

        They are of one minibatch, at least one; the state is given up: its buffers
        become the new state's.

        Returns:
          The new state; the record of `losses.summarise` with `policy/grad_norm`,
          `policy/learning_rate` and `policy/update_skipped` (1 where loss or gradient
          was not finite and the state is unchanged); and the log-probabilities
          `[rows, M] float32` of each micro-batch under the policy before the step.

        Raises:
          ValueError: the rows do not divide over the mesh.
        """
        carry = self._pool.get(self._zeros_program())()
        fetched = []
        for batch in micro_batches:
            rows, columns = self._place(batch.rows), self._place(batch.columns)
            program = self._accumulate_program(rows, columns, cfg, batch.num_sequences)
            carry, *outputs = self._pool.get(program)(
                state.params, carry, rows, columns
            )
            fetched.append(outputs)
        step = self._pool.get(self._apply_program())
        state, outcome = step(state, carry)
        del carry
        sums, logprobs = zip(*jax.device_get(fetched), strict=True)
        record = {name: float(value) for name, value in outcome.items()}
        # On the host, in double precision.
        total = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
        record = losses.summarise(total) | routing.summarise(total) | record
        return state, record, list(logprobs)

    def _abstract_train_state(self) -> train_state.TrainState:
        model = self.forward_cfg.model
        abstract = model_params.abstract(model)
        axes = model_params.logical_axes(model)
        params = jax.tree.map(
            _placed,
            abstract,
            sharding_lib.tree_shardings(self.mesh, self.rules, axes, abstract),
        )
        opt_state = optax.tree_map_params(
            self.optimizer,
            lambda leaf, param: _placed(leaf, param.sharding),
            jax.eval_shape(self.optimizer.init, params),
            params,
            transform_non_params=lambda leaf: _placed(leaf, self._replicated),
        )
        count = _placed(jax.ShapeDtypeStruct((), jnp.int32), self._replicated)
        return train_state.TrainState(params, opt_state, count)

    def _check_params(self, params: model_params.Params) -> None:
        if isinstance(params.layers, tuple):
            raise ValueError(
                "params.layers is a tuple of layers: the learner keeps them stacked; "
                "give the params before params.unstack."
            )
        got = jax.tree.map(lambda x: x.shape, params)
        wanted = jax.tree.map(lambda x: x.shape, self._state.params)
        if got != wanted:
            raise ValueError(
                f"params have shapes {got}, but the model's are {wanted}: load them "
                "with the same ModelConfig."
            )

    def _place(self, tree: Any) -> Any:
        """Put arrays `[B, ...]` on the mesh, rows split over its batch axes."""

        def one(array):
            return sharding_lib.place(
                array,
                sharding_lib.named(self.mesh, self.rules, ("batch",), array.shape),
            )

        return jax.tree.map(one, tree)

    def _constrain(self, x_DBT: Array) -> Array:
        """Split what is kept of every layer over all devices, not by rows alone."""
        where = sharding_lib.named(
            self.mesh,
            self.rules,
            (None, "batch", "sequence"),
            x_DBT.shape,
            replicate=True,
        )
        return lax.with_sharding_constraint(x_DBT, where)

    def _fetched(self):
        """Where a value per row is left: by rows, unless others hold some of them."""
        if sharding_lib.spans_processes(self.mesh):
            return self._replicated
        return sharding_lib.named(self.mesh, self.rules, ("batch",))

    def _logprobs_program(self, rows: policy_gradient.Rows) -> programs.Program:
        def compute(params, rows):
            return policy_gradient.token_logprobs(
                params, rows, cfg=self.forward_cfg, constrain=self._constrain
            )[0]

        def lower():
            jitted = jax.jit(compute, out_shardings=self._fetched())
            return jitted.lower(self._state.params, rows)

        return programs.Program((*self._key, "logprobs", _shapes(rows)), lower)

    def _accumulate_program(self, rows, columns, cfg, num_sequences):
        compute = functools.partial(
            policy_gradient.accumulate,
            cfg=self.forward_cfg,
            loss_cfg=cfg,
            num_sequences=num_sequences,
            constrain=self._constrain,
        )

        def lower():
            outputs = (_shardings(self._gradient), self._replicated, self._fetched())
            jitted = jax.jit(compute, donate_argnums=1, out_shardings=outputs)
            return jitted.lower(self._state.params, self._gradient, rows, columns)

        shapes = _shapes((rows, columns))
        key = (*self._key, "accumulate", cfg, num_sequences, shapes)
        return programs.Program(key, lower)

    def _zeros_program(self) -> programs.Program:
        def zeros():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._gradient)

        def lower():
            return jax.jit(zeros, out_shardings=_shardings(self._gradient)).lower()

        return programs.Program((*self._key, "zeros"), lower)

    def _apply_program(self) -> programs.Program:
        def apply(state, gradient):
            rate = self._schedule(state.num_updates)
            state, norm, skipped = train_state.step(
                state, gradient.params, gradient.loss, self.optimizer
            )
            return state, {
                "policy/learning_rate": rate,
                "policy/grad_norm": norm,
                "policy/update_skipped": skipped,
            }

        def lower():
            outputs = (_shardings(self._state), self._replicated)
            jitted = jax.jit(apply, donate_argnums=0, out_shardings=outputs)
            return jitted.lower(self._state, self._gradient)

        return programs.Program((*self._step_key, "apply"), lower)

    def _digest_program(self) -> programs.Program:
        def lower():
            jitted = jax.jit(weights_digest.sums, out_shardings=self._replicated)
            return jitted.lower(self._state.params)

        return programs.Program((*self._key, "digest"), lower)


def _placed(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _shapes(tree: Any) -> tuple:
    """Hashable description of arrays, absent ones included."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    return tuple(None if x is None else x.shape for x in leaves)
