"""The drafter while it learns: its weights on whatever devices are free, step by step.

One copy of the weights exists. A training moves it to the devices of the workers that
wait, data-parallel over them, and takes steps there; engines get copies with a version.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tlt_jax import sharding
from tlt_jax.models import drafter, drafter_head
from tlt_jax.models import params as model_params
from tlt_jax.specdec import (
    drafter_acceptance,
    drafter_training,
    drafter_unroll,
    programs,
)
from tlt_jax.types import Array

Devices = tuple[jax.Device, ...]


class DrafterLearner:
    """Takes training steps on given devices.

    Attributes:
      cfg: the drafter.
      state: float32, without `draft_ids`; in host memory between trainings.
      draft_ids: `[Vd] int32` in host memory, or None: all tokens, or not yet chosen.
      sharpness: of coupled drafts, as last measured.
      pool: of compiled programs.
    """

    def __init__(
        self,
        cfg: drafter.DrafterConfig,
        objective: drafter_training.Objective,
        optimizer: optax.GradientTransformation,
        *,
        batch_shape: Callable[[], drafter_unroll.Batch],
        head_chunk: int,
        depth: int,
        dtype: str,
    ):
        """Prepare; `begin` gives weights.

        Args:
          cfg: the drafter.
          objective: what it learns.
          optimizer: as is.
          batch_shape: makes a batch's shapes and dtypes.
          head_chunk: bases whose logits are held at once.
          depth: levels of which acceptance is measured.
          dtype: of activations and products.
        """
        self.cfg = cfg
        self.draft_ids: np.ndarray | None = None
        self.sharpness = 1.0
        self.pool = programs.ProgramPool()
        self._objective, self._optimizer = objective, optimizer
        self._batch_shape, self._depth = batch_shape, depth
        self._forward = drafter_unroll.ForwardConfig(
            cfg, dtype=jnp.dtype(dtype), head_chunk=head_chunk
        )
        self.state: drafter_training.TrainState | None = None
        self._placed: drafter_training.TrainState | None = None
        self._target: drafter_unroll.Target | None = None
        self._mesh: jax.sharding.Mesh | None = None

    @property
    def num_rows(self) -> int:
        """Rows of a batch."""
        return self._batch_shape().tokens.shape[0]

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken so far."""
        return 0 if self.state is None else int(self.state.num_updates)

    @property
    def has_vocabulary(self) -> bool:
        """Whether it is known which tokens can be proposed."""
        return self.draft_ids is not None or not self.cfg.draft_vocab_size

    def init_state(
        self, params: drafter.DrafterParams | None, norm: Array, seed: int
    ) -> drafter_training.TrainState:
        """Make a state with these weights, or random ones.

        Args:
          params: trained before, or None.
          norm: `[D]`, the target's final norm: the head is made for its scale.
          seed: of random weights.
        """
        state = self._random_state(seed)
        if params is not None:
            if params.sharpness is not None:
                self.sharpness = float(params.sharpness)
            own = params.replace(draft_ids=None, sharpness=None)
            own = jax.tree.map(lambda x: x.astype(jnp.float32), own)
            state = state.replace(params=own)
        elif state.params.norm is not None:
            own = state.params.replace(norm=jnp.asarray(norm, jnp.float32))
            state = state.replace(params=own)
        return jax.device_get(state)

    def _random_state(self, seed: int) -> drafter_training.TrainState:
        params = drafter.init(self.cfg, jax.random.key(seed))
        return drafter_training.TrainState(
            params, self._optimizer.init(params), jnp.int32(0)
        )

    def abstract_state(self) -> drafter_training.TrainState:
        """Describe `state`."""
        return jax.eval_shape(lambda: self._random_state(0))

    def devices_of(self, meshes: Sequence[jax.sharding.Mesh]) -> Devices:
        """Choose what to train on: a device of each worker, as many as divide a batch.

        Args:
          meshes: of the workers that wait, in their order.

        Returns:
          The first devices of the first workers.
        """
        first = [mesh.devices.flat[0] for mesh in meshes]
        count = len(first)
        while self.num_rows % count:
            count -= 1
        return tuple(first[:count])

    def prepare(self, devices: Devices, target: model_params.Params) -> None:
        """Compile the step and the measurement for devices, in the background."""
        for program in self._programs(devices, target):
            self.pool.prepare(*program)

    def is_ready(
        self, devices: Devices, target: model_params.Params, timeout_s: float = 0.0
    ) -> bool:
        """Tell whether the programs are there; wait for them for a while.

        Raises an error of their compilation.
        """
        return all(
            self.pool.is_ready(key, timeout_s)
            for key, _ in self._programs(devices, target)
        )

    def begin(self, devices: Devices, target: model_params.Params) -> None:
        """Move to these devices, with what is read of the target.

        Args:
          devices: one, or several that share each batch's rows.
          target: as some engine has it.
        """
        mesh = _mesh(devices)
        everywhere = sharding.replicated(mesh)
        state = self._placed if self._placed is not None else self.state
        self._placed = jax.device_put(state, everywhere)
        ids = None if self.draft_ids is None else jnp.asarray(self.draft_ids)
        self._target = jax.device_put(
            drafter_unroll.Target(
                target.embed, drafter_head.head_rows(target, ids), ids
            ),
            everywhere,
        )
        self._mesh = mesh
        self._step, self._measure = (
            self.pool.get(*program) for program in self._programs(devices, target)
        )

    def step(self, batch: drafter_unroll.Batch) -> dict[str, Array]:
        """Take a step; what comes back is on its way.

        Returns:
          See `drafter_training.step`.
        """
        placed = self._place(batch)
        self._placed, outcome = self._step(self._placed, placed, self._target)
        return outcome

    def measure(self, batch: drafter_unroll.Batch) -> dict[str, Any]:
        """Say what drafts along a batch's texts would have had accepted.

        The sharpness that would have been the best one is used from now on.
        """
        sums = self._measure(self._placed.params, self._place(batch), self._target)
        found = drafter_acceptance.summarise(jax.device_get(sums))
        self.sharpness = found["sharpness"]
        return found

    def end(self, keep: bool = True) -> None:
        """Leave the devices, with what was learned there or without it."""
        if keep and self._placed is not None:
            self.state = jax.device_get(self._placed)
        self._placed = self._target = None

    def weights(self, dtype: str) -> drafter.DrafterParams:
        """Return a copy for engines, with `draft_ids` and sharpness."""
        state = self._placed if self._placed is not None else self.state
        params = jax.device_get(state.params)
        cast = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
        return cast.replace(
            draft_ids=self.draft_ids, sharpness=np.float32(self.sharpness)
        )

    def _place(self, batch: drafter_unroll.Batch) -> drafter_unroll.Batch:
        return jax.device_put(batch, self._by_rows(self._mesh))

    def _by_rows(self, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
        return sharding.named(mesh, sharding.ShardingRules(), ("batch",))

    def _programs(self, devices: Devices, target: model_params.Params):
        """Keys and lowerings of the step and the measurement."""
        key = tuple(device.id for device in devices)

        def arguments():
            mesh = _mesh(devices)
            everywhere = sharding.replicated(mesh)
            state = _described(self.state, everywhere)
            batch = _described(self._batch_shape(), self._by_rows(mesh))
            size = self.cfg.num_draft_tokens
            ids = None
            if self.cfg.draft_vocab_size:
                ids = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=everywhere)
            given = _described((target.embed, target.head), everywhere)
            head = jax.ShapeDtypeStruct(
                (size, given[1].shape[1]), given[1].dtype, sharding=everywhere
            )
            return state, batch, drafter_unroll.Target(given[0], head, ids), everywhere

        def lower_step():
            state, batch, given, everywhere = arguments()
            step = functools.partial(
                drafter_training.step,
                cfg=self._forward,
                objective=self._objective,
                optimizer=self._optimizer,
            )
            jitted = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
            return jitted.lower(state, batch, given)

        def lower_measure():
            state, batch, given, everywhere = arguments()
            measure = functools.partial(
                drafter_acceptance.measure, num_steps=self._depth, cfg=self._forward
            )
            jitted = jax.jit(measure, out_shardings=everywhere)
            return jitted.lower(state.params, batch, given)

        programs_: tuple[tuple[Hashable, Callable], ...] = (
            (("drafter_step", key), lower_step),
            (("drafter_measure", key), lower_measure),
        )
        return programs_


def _mesh(devices: Devices) -> jax.sharding.Mesh:
    return sharding.make_mesh(len(devices), 1, 1, devices)


def _described(tree: Any, where: jax.sharding.Sharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            jnp.shape(leaf), jnp.result_type(leaf), sharding=where
        ),
        tree,
    )
