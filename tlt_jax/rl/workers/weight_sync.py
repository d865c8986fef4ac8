"""Transfer of the policy from the learner's mesh to a rollout engine's, versioned."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.runtime import programs
from tlt_jax.runtime import sharding as sharding_lib

_RULES = sharding_lib.ShardingRules()


def engine_meshes(
    mesh: jax.sharding.Mesh, num_workers: int = 1, tensor: int = 0
) -> list[jax.sharding.Mesh]:
    """Return the meshes of this process's rollout engines beside a learner on `mesh`.

    Each has `tensor` devices that stand side by side in the learner's mesh and belong
    to this process; heads and vocabulary are split over them. 0: as many as the learner
    splits them over.

    Raises:
      ValueError: there are not as many places, or the mesh does not divide into them.
    """
    tensor = tensor or mesh.devices.shape[-1]
    if mesh.size % tensor:
        raise ValueError(
            f"rollout.tensor={tensor} does not divide the mesh's {mesh.size} devices: "
            "give each engine a number that does."
        )
    own = jax.process_index()
    places = mesh.devices.reshape(-1, tensor)
    places = [p for p in places if all(d.process_index == own for d in p)]
    if num_workers > len(places):
        num_own = sum(d.process_index == own for d in mesh.devices.flat)
        raise ValueError(
            f"workers.num={num_workers} needs as many places of {tensor} devices for "
            f"engines, but the {num_own} devices that this process has in the mesh are "
            f"{len(places)}: use fewer workers, fewer devices for each (rollout.tensor)"
            " or more devices."
        )
    stride = len(places) // num_workers
    return [
        sharding_lib.make_mesh(1, 1, tensor, devices=list(place))
        for place in places[: stride * num_workers : stride]
    ]


class WeightSync:
    """Casts, reshards and unstacks the learner's weights for rollout engines.

    The result never shares a buffer with the learner, whose next update may thus give
    its own up, and nothing of it passes through the host. Weights go layer by layer: a
    program on the learner's mesh makes one layer, whichever, laid out as an engine has
    it on every place that an engine may have; an engine takes what its devices hold of
    it already. So the peak beyond the engines' weights is one layer, or the embedding
    and the head, on devices that no engine has. If the learner's mesh spans several
    processes, all take part at the same time, and each gets the whole weights for its
    own engines.

    Attributes:
      version: transfers made so far; the version of the newest weights.
      placed: the engines' shardings.
    """

    def __init__(
        self,
        model: model_config.ModelConfig,
        *,
        source: jax.sharding.Mesh,
        targets: Sequence[jax.sharding.Mesh],
        pool: programs.ProgramPool,
        dtype: Any = jnp.float32,
    ):
        """Prepare the shardings; nothing is compiled yet.

        `source` is the learner's mesh; `targets` are the engines', all of one size, and
        `dtype` is that of their weights.

        Raises:
          ValueError: a weight does not divide over a mesh.
        """
        self._pool = pool
        self._dtype = jnp.dtype(dtype)
        self._key = ("weight_sync", model, source, *targets, self._dtype)
        self.version = 0
        self._num_layers = model.num_layers
        self._replicated = sharding_lib.replicated(source)
        self._learners = engine_programs.abstract_of(
            model_params.abstract(model), _shardings(model, source)
        )
        self.placed = [_unstacked(model, target) for target in targets]
        same = [list(source.devices.flat) == list(t.devices.flat) for t in targets]
        self._same_devices = same == [True]
        if self._same_devices:
            self._middle = self.placed[0]
        else:
            # Collectives between the learner's devices gather what it has split: an
            # array that is split otherwise would be copied through the host.
            gathered = sharding_lib.ShardingRules(embed=(), expert=())
            places = sharding_lib.regrouped(source, targets[0].size)
            self._middle = _unstacked(model, places, gathered)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON."""
        return {"version": self.version}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`: the next transfer makes that version anew."""
        self.version = state["version"] - 1

    def sync(
        self, params: model_params.Params
    ) -> tuple[list[model_params.Params], int]:
        """Give the engines the learner's present weights.

        Returns what `place` does, and the version, counted from 1.
        """
        placed = self.place(params)
        self.version += 1
        return placed, self.version

    def place(self, params: model_params.Params) -> list[model_params.Params]:
        """Make the engines' weights of the learner's, of any version.

        `params` are as in `train_state.TrainState`, and kept as they are.

        Returns:
          Each engine's params (a tuple of layers, on its mesh, in its dtype), complete
          when returned.
        """
        wanted = list(zip(*map(in_parts, self.placed), strict=True))
        parts, given = self.parts(params), []
        for where in wanted:
            given.append(self._give(next(parts), where))
        placed = [joined(own) for own in zip(*given, strict=True)]
        jax.block_until_ready(placed)
        return placed

    def parts(self, params: model_params.Params) -> Iterator[Any]:
        """Make the engines' weights part by part, in the order of `in_parts`.

        Each is on the learner's devices, laid out as engines have it there.
        """
        one_layer = self._pool.get(self._layer_program())
        others = self._pool.get(self.others_program())
        yield others(_without_layers(params))
        for index in self._which:
            yield one_layer(params.layers, index)

    @functools.cached_property
    def _which(self) -> list[jax.Array]:
        """The layers' numbers, which go to the devices once."""
        numbers = np.arange(self._num_layers, dtype=np.int32)
        return [sharding_lib.place(i, self._replicated) for i in numbers]

    def _layer_program(self) -> programs.Program:
        """Make one layer of the engines' weights."""

        def make(layers, index):
            layer = jax.tree.map(
                lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False),
                layers,
            )
            return _cast(layer, self._dtype)

        jitted = jax.jit(make, out_shardings=self._middle.layers[0])
        index = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
        lower = functools.partial(jitted.lower, self._learners.layers, index)
        return programs.Program((*self._key, "layer"), lower)

    def others_program(self) -> programs.Program:
        """Make the rest of them: embedding, final norm, head."""
        jitted = jax.jit(
            functools.partial(_cast, dtype=self._dtype),
            out_shardings=_without_layers(self._middle),
        )
        lower = functools.partial(jitted.lower, _without_layers(self._learners))
        return programs.Program((*self._key, "others"), lower)

    def _give(self, made: Any, wanted: list[Any]) -> list[Any]:
        """Give every engine its parts of a tree, whose leaves go one by one."""
        if self._same_devices:
            return [made]
        leaves, treedef = jax.tree.flatten(made)
        del made
        shardings = [jax.tree.leaves(target) for target in wanted]
        copies: list[list] = [[] for _ in wanted]
        for i in range(len(leaves)):
            for copy, where in zip(copies, shardings, strict=True):
                copy.append(_take_own(leaves[i], where[i]))
            # All have it.
            leaves[i] = None
        return [jax.tree.unflatten(treedef, copy) for copy in copies]


class ToOthers(WeightSync):
    """Makes the weights of engines in other processes, which have none here.

    A part is whole on each of the learner's devices, one at a time, and from there on
    the host.
    """

    def __init__(
        self,
        model: model_config.ModelConfig,
        *,
        source: jax.sharding.Mesh,
        pool: programs.ProgramPool,
        dtype: Any = jnp.float32,
        keeps: bool = False,
    ):
        """See `WeightSync`; for `keeps` see `place`."""
        own = sharding_lib.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
        super().__init__(model, source=source, targets=[own], pool=pool, dtype=dtype)
        self._keeps = keeps

    def place(self, params: model_params.Params) -> Callable[[], Iterator[Any]]:
        """Return what makes the weights' parts of NumPy arrays, each time it is called.

        It holds until the learner's next update and makes one at a time. Where they
        are to be kept longer all are made now, on the host.
        """
        if self._keeps:
            return functools.partial(iter, list(self._on_host(params)))
        return functools.partial(self._on_host, params)

    def _on_host(self, params: model_params.Params) -> Iterator[Any]:
        parts = self.parts(params)
        for _ in range(1 + self._num_layers):
            yield jax.tree.map(_whole, next(parts))


def shardings_of(
    model: model_config.ModelConfig, mesh: jax.sharding.Mesh
) -> model_params.Params:
    """Return the shardings of an engine's weights on its mesh.

    Raises:
      ValueError: a weight does not divide over it.
    """
    return _unstacked(model, mesh)


def in_parts(params: model_params.Params) -> list[Any]:
    """Part what has a place for each weight of an engine: the rest, then its layers."""
    return [_without_layers(params), *params.layers]


def joined(parts: Sequence[Any]) -> model_params.Params:
    """Put together what `in_parts` has parted."""
    others, *layers = parts
    return others.replace(layers=tuple(layers))


def _take_own(leaf: jax.Array, target: jax.sharding.NamedSharding) -> jax.Array:
    """Make an array of the parts of `leaf` that the target's devices hold."""
    parts = leaf.addressable_shards
    held = {(_bounds(s.index, leaf.shape), s.device): s.data for s in parts}
    # A backend may give an engine of all devices another order than the learner's.
    elsewhere = {_bounds(s.index, leaf.shape): s.data for s in parts}
    wanted = target.addressable_devices_indices_map(leaf.shape)
    own = []
    for device, index in wanted.items():
        bounds = _bounds(index, leaf.shape)
        part = held.get((bounds, device), elsewhere[bounds])
        own.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(leaf.shape, target, own)


def _whole(leaf: jax.Array) -> np.ndarray:
    """Bring an array to the host that each device has whole."""
    return np.asarray(leaf.addressable_shards[0].data)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _without_layers(params: model_params.Params) -> model_params.Params:
    return params.replace(layers=())


def _shardings(model, mesh, rules=_RULES) -> model_params.Params:
    return sharding_lib.tree_shardings(
        mesh, rules, model_params.logical_axes(model), model_params.abstract(model)
    )


def _unstacked(model, mesh, rules=_RULES) -> model_params.Params:
    _shardings(model, mesh, rules)  # checks divisibility, naming the leaf
    axes = model_params.logical_axes(model)
    layer = jax.tree.map(
        lambda names: names[1:], axes.layers, is_leaf=sharding_lib.is_axes
    )
    axes = axes.replace(layers=(layer,) * model.num_layers)
    return sharding_lib.tree_shardings(mesh, rules, axes)
