"""Transfer of the policy from the learner's mesh to a rollout engine's, versioned."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax import sharding as sharding_lib
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.specdec import programs


def engine_meshes(
    mesh: jax.sharding.Mesh, num_workers: int = 1
) -> list[jax.sharding.Mesh]:
    """Return the meshes of this process's rollout engines beside a learner on `mesh`.

    Each has the devices of one place along `data` and `fsdp`, split by `tensor` as the
    learner is, so that heads and vocabulary stay where they are.

    Raises:
      ValueError: there are not as many places.
    """
    everywhere = mesh.devices.reshape(-1, mesh.devices.shape[-1])
    own = jax.process_index()
    groups = [g for g in everywhere if all(d.process_index == own for d in g)]
    if num_workers > len(groups):
        num_own = sum(d.process_index == own for d in mesh.devices.flat)
        raise ValueError(
            f"workers.num={num_workers} needs as many places along mesh.data and "
            f"mesh.fsdp, but {num_own} devices of this process with mesh.tensor="
            f"{everywhere.shape[1]} have {len(groups)}: use fewer workers or more "
            "devices."
        )
    stride = len(groups) // num_workers
    return [
        sharding_lib.make_mesh(1, 1, len(group), devices=list(group))
        for group in groups[: stride * num_workers : stride]
    ]


class WeightSync:
    """Casts, reshards and unstacks the learner's weights for rollout engines.

    The result never shares a buffer with the learner, whose next update may thus give
    its own up. One program is compiled, on the learner's mesh; where an engine has
    fewer devices its output is copied leaf by leaf, each given up as soon as all have
    it: the peak beyond the engines' weights is one copy in their dtype, split over the
    learner's mesh. If that spans several processes, all take part at the same time, and
    each gets the whole weights for its own engines.
    """

    def __init__(
        self,
        model: model_config.ModelConfig,
        *,
        source: jax.sharding.Mesh,
        targets: Sequence[jax.sharding.Mesh],
        pool: programs.ProgramPool,
        dtype: Any = jnp.float32,
        rules: sharding_lib.ShardingRules | None = None,
    ):
        """Prepare the shardings; nothing is compiled yet.

        Args:
          model: the policy.
          source: the learner's mesh.
          targets: the engines' meshes.
          pool: of compiled programs.
          dtype: of the engine's weights.
          rules: logical to mesh axes, on both meshes; None: the default ones.

        Raises:
          ValueError: a weight does not divide over a mesh.
        """
        rules = rules or sharding_lib.ShardingRules()
        self._pool = pool
        self._dtype = jnp.dtype(dtype)
        self._key = ("weight_sync", model, source, *targets, rules, self._dtype)
        self._version = 0
        self._source = _shardings(model, source, rules)
        self._abstract = model_params.abstract(model)
        self._targets = [_unstacked(model, target, rules) for target in targets]
        same = [list(source.devices.flat) == list(t.devices.flat) for t in targets]
        self._same_devices = same == [True]
        self._spans_processes = sharding_lib.spans_processes(source)
        if self._same_devices:
            self._middle = self._targets[0]
        elif self._spans_processes:
            # Every process gets what its engines need.
            gathered = dataclasses.replace(rules, embed=())
            self._middle = _unstacked(model, source, gathered)
        else:
            self._middle = _unstacked(model, source, rules)

    @property
    def version(self) -> int:
        """Transfers made so far; the version of the newest weights."""
        return self._version

    def restore_version(self, version: int) -> None:
        """Go on counting from `version`, after a restart."""
        if version < 0:
            raise ValueError(f"version={version} is negative: versions count from 0.")
        self._version = version

    def sync(
        self, params: model_params.Params
    ) -> tuple[list[model_params.Params], int]:
        """Give the engines the learner's present weights.

        Args:
          params: as in `learner.TrainState`; kept as they are.

        Returns:
          Each engine's params (a tuple of layers, on its mesh, in its dtype), complete
          when returned, and their version, counted from 1.
        """
        program = self._pool.get(self._key, self._lower)
        leaves, treedef = jax.tree.flatten(program(params))
        if self._same_devices:
            copies = [leaves]
        else:
            move = _take_own if self._spans_processes else jax.device_put
            wanted = [jax.tree.leaves(target) for target in self._targets]
            copies = [[] for _ in wanted]
            for i in range(len(leaves)):
                for copy, shardings in zip(copies, wanted, strict=True):
                    copy.append(move(leaves[i], shardings[i]))
                # All have it.
                leaves[i] = None
        placed = [jax.tree.unflatten(treedef, copy) for copy in copies]
        jax.block_until_ready(placed)
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


def _take_own(leaf: jax.Array, target: jax.sharding.NamedSharding) -> jax.Array:
    """Make an array of this process of its parts of an array of several."""
    parts = {_bounds(s.index, leaf.shape): s.data for s in leaf.addressable_shards}
    wanted = target.addressable_devices_indices_map(leaf.shape)
    own = [
        jax.device_put(parts[_bounds(index, leaf.shape)], device)
        for device, index in wanted.items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, target, own)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


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
