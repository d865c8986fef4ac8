"""Transfer of the policy from the learner's mesh to a rollout engine's, versioned."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax import sharding as sharding_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.specdec import programs


def engine_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Return the mesh of a rollout engine beside a learner on `mesh`.

    Its devices are the learner's first ones along `tensor`, so that heads and
    vocabulary stay where they are.
    """
    first = list(mesh.devices[0, 0])
    return sharding_lib.make_mesh(1, 1, len(first), devices=first)


class WeightSync:
    """Casts, reshards and unstacks the learner's weights for a rollout engine.

    The result never shares a buffer with the learner, whose next update may thus give
    its own up. One program is compiled, on the learner's mesh; where the engine has
    fewer devices its output is moved leaf by leaf, each given up as soon as it is
    copied: the peak beyond the engine's weights is one copy in the engine's dtype,
    split over the learner's mesh.
    """

    def __init__(
        self,
        model: model_config.ModelConfig,
        *,
        source: jax.sharding.Mesh,
        target: jax.sharding.Mesh,
        pool: programs.ProgramPool,
        dtype: Any = jnp.float32,
        rules: sharding_lib.ShardingRules | None = None,
    ):
        """Prepare the shardings; nothing is compiled yet.

        Args:
          model: the policy.
          source: the learner's mesh.
          target: the engine's mesh.
          pool: of compiled programs.
          dtype: of the engine's weights.
          rules: logical to mesh axes, on both meshes; None: the default ones.

        Raises:
          ValueError: a weight does not divide over a mesh.
        """
        rules = rules or sharding_lib.ShardingRules()
        self._pool = pool
        self._dtype = jnp.dtype(dtype)
        self._key = ("weight_sync", model, source, target, rules, self._dtype)
        self._version = 0
        self._source = _shardings(model, source, rules)
        self._abstract = model_params.abstract(model)
        self._target = _unstacked(model, target, rules)
        self._same_devices = list(source.devices.flat) == list(target.devices.flat)
        self._middle = (
            self._target if self._same_devices else _unstacked(model, source, rules)
        )

    @property
    def version(self) -> int:
        """Transfers made so far; the version of the newest weights."""
        return self._version

    def restore_version(self, version: int) -> None:
        """Go on counting from `version`, after a restart."""
        if version < 0:
            raise ValueError(f"version={version} is negative: versions count from 0.")
        self._version = version

    def sync(self, params: model_params.Params) -> tuple[model_params.Params, int]:
        """Give the engine the learner's present weights.

        Args:
          params: as in `learner.TrainState`; kept as they are.

        Returns:
          The engine's params (a tuple of layers, on the engine's mesh, in its dtype),
          complete when returned, and their version, counted from 1.
        """
        program = self._pool.get(self._key, self._lower)
        leaves, treedef = jax.tree.flatten(program(params))
        if not self._same_devices:
            targets = jax.tree.leaves(self._target)
            for i, target in enumerate(targets):
                # Replacing the entry gives its predecessor up.
                leaves[i] = jax.device_put(leaves[i], target)
        placed = jax.block_until_ready(jax.tree.unflatten(treedef, leaves))
        self._version += 1
        return placed, self._version

    def _lower(self) -> jax.stages.Lowered:
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            self._abstract,
            self._source,
        )
        convert = functools.partial(_convert, dtype=self._dtype)
        return jax.jit(convert, out_shardings=self._middle).lower(params)


def _convert(params: model_params.Params, *, dtype: Any) -> model_params.Params:
    """Cast and unstack into fresh buffers."""
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return model_params.unstack(cast)


def _axes(model: model_config.ModelConfig) -> model_params.Params:
    """Logical axes of unstacked params."""
    axes = model_params.logical_axes(model)
    one_layer = jax.tree.map(
        lambda names: names[1:], axes.layers, is_leaf=sharding_lib.is_axes
    )
    return axes.replace(layers=(one_layer,) * model.num_layers)


def _shardings(model, mesh, rules) -> model_params.Params:
    return sharding_lib.tree_shardings(
        mesh, rules, model_params.logical_axes(model), model_params.abstract(model)
    )


def _unstacked(model, mesh, rules) -> model_params.Params:
    _shardings(model, mesh, rules)  # checks divisibility, naming the leaf
    return sharding_lib.tree_shardings(mesh, rules, _axes(model))
