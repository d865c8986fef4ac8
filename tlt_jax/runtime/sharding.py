"""Where arrays live: logical axis names mapped to the axes of a device mesh.

Weights, states and batches name what their axes mean; one `ShardingRules` says which
mesh axes each name is split over. Partition specs are made here and nowhere else.

The mesh has three axes. `data`: copies of the weights, each with its part of the
batch. `fsdp`: weights and batch both split. `tensor`: heads, feed-forward and
vocabulary split. That of a mixture of experts may have a fourth, `expert`: experts and
batch both split, and other weights as by `fsdp`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
_WITH_EXPERTS = ("data", "fsdp", "expert", "tensor")

# Logical names of one array's axes; None: never split.
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes over which each logical axis is split; empty: not split."""

    embed: tuple[str, ...] = ("fsdp", "expert")  # D, of weights.
    mlp: tuple[str, ...] = ("tensor",)  # F.
    kv_heads: tuple[str, ...] = ("tensor",)  # K, of weights and of the cache.
    vocab: tuple[str, ...] = ("tensor",)  # V.
    expert: tuple[str, ...] = ("expert",)  # X.
    layer: tuple[str, ...] = ()  # L.
    batch: tuple[str, ...] = ("data", "fsdp", "expert")  # Rows of any batch.
    # T, of the activations between layers that training keeps.
    sequence: tuple[str, ...] = ("tensor",)
    page: tuple[str, ...] = ()  # Pages of the cache.
    feature: tuple[str, ...] = ("tensor",)  # n x D that pages keep for a drafter.

    def __post_init__(self):
        for field in dataclasses.fields(self):
            for axis in getattr(self, field.name):
                if axis not in _WITH_EXPERTS:
                    raise ValueError(
                        f"{field.name}={getattr(self, field.name)!r} names no mesh axis"
                        f" {axis!r}: use {', '.join(_WITH_EXPERTS)}."
                    )

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """Return the mesh axes that the logical axis `name` is split over."""
        if name is None:
            return ()
        known = [field.name for field in dataclasses.fields(self)]
        if name not in known:
            raise ValueError(
                f"logical axis {name!r} has no rule: use {', '.join(known)} or None."
            )
        return getattr(self, name)


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    expert: int = 1,
) -> Mesh:
    """Arrange devices as a (data, fsdp, tensor) mesh, or as one with `expert`.

    Those of one process stand side by side, `tensor` first.

    Args:
      data, fsdp, tensor, expert: devices along each axis, at least 1; at most one is -1
        and takes all that remain. Without `expert`, 1, the mesh has no such axis.
      devices: the devices to use, default all. Sizes without a -1 may ask for fewer:
        the first ones are taken.

    Raises:
      ValueError: the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    axes, sizes = MESH_AXES, [data, fsdp, tensor]
    if expert != 1:
        axes, sizes = _WITH_EXPERTS, [data, fsdp, expert, tensor]
    kinds = (AxisType.Auto,) * len(axes)
    asked = f"mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    asked += f", expert={expert}" if expert != 1 else ""
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"{asked}: give sizes of at least 1, at most one of them -1.")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if len(devices) % fixed:
            raise ValueError(
                f"{asked}: {len(devices)} devices do not divide into groups of {fixed}."
            )
        sizes[sizes.index(-1)] = len(devices) // fixed
    total = math.prod(sizes)
    if total > len(devices):
        raise ValueError(
            f"{asked} needs {total} devices, but there are {len(devices)}: lower a "
            "size or set one to -1."
        )
    if len({device.process_index for device in devices}) > 1:
        # Process by process: neighbours along `tensor` can then be one engine's, whose
        # devices must be of one process. By their links a line of chips would be.
        devices.sort(key=lambda device: device.process_index)
    elif total == len(jax.devices()) and devices == jax.devices():
        # Lets the backend order the devices by their links.
        return jax.make_mesh(tuple(sizes), axes, axis_types=kinds)
    grid = np.array(devices[:total]).reshape(sizes)
    return Mesh(grid, axes, axis_types=kinds)


def regrouped(mesh: Mesh, tensor: int) -> Mesh:
    """Return the mesh of the same devices, in their order, in groups of `tensor`."""
    grid = mesh.devices.reshape(1, -1, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def num_parts(mesh: Mesh, axes: Sequence[str]) -> int:
    """Return into how many parts these axes split; one that is not there does not."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def named(
    mesh: Mesh,
    rules: ShardingRules,
    axes: Axes,
    shape: tuple[int, ...] | None = None,
    replicate: bool = False,
) -> NamedSharding:
    """Return the sharding of an array whose axes are called `axes`.

    Args:
      mesh: of `make_mesh`; axes that it does not have split nothing.
      rules: logical to mesh axes. A mesh axis serves one array axis: of two that ask
        for it the first gets it.
      axes: a logical name or None per array axis; trailing ones may be left out.
      shape: of the array; checked when given.
      replicate: what becomes of an array axis that its mesh axes do not divide: an
        error (False), or the axis is not split (True).

    Raises:
      ValueError: a name has no rule, or an axis does not divide.
    """
    used: set[str] = set()
    spec = []
    for i, name in enumerate(axes):
        there = (axis for axis in rules.mesh_axes(name) if axis in mesh.shape)
        wanted = tuple(axis for axis in there if axis not in used)
        parts = num_parts(mesh, wanted)
        if shape is not None and shape[i] % parts:
            if not replicate:
                raise ValueError(
                    f"axis {i} ({name}) of shape {tuple(shape)} does not divide over "
                    f"mesh axes {wanted} of {parts} devices: use a mesh whose size "
                    f"divides {shape[i]}, or replicate it."
                )
            wanted = ()
        used.update(wanted)
        spec.append(wanted if len(wanted) != 1 else wanted[0])
    return NamedSharding(mesh, PartitionSpec(*(part or None for part in spec)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def spans_processes(mesh: Mesh) -> bool:
    """Say whether devices of other processes belong to the mesh."""
    return any(d.process_index != jax.process_index() for d in mesh.devices.flat)


def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Put a host array, of which every process has all, where `sharding` says."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )


def is_axes(node: Any) -> bool:
    """Say whether `node` of a tree is one array's logical axes."""
    return type(node) is tuple and all(
        name is None or isinstance(name, str) for name in node
    )


def tree_shardings(
    mesh: Mesh,
    rules: ShardingRules,
    axes: Any,
    shapes: Any = None,
) -> Any:
    """Return the `NamedSharding`s of a tree of arrays.

    `axes` has a tuple of logical names at the place of every array. Divisibility is
    checked where `shapes` are given: a tree of the same structure whose leaves have a
    `.shape`. For mesh and rules see `named`.
    """

    def one(path, names: Axes, leaf: Any = None) -> NamedSharding:
        try:
            shape = None if leaf is None else leaf.shape
            return named(mesh, rules, names, shape)
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)}: {error}") from error

    trees = (axes,) if shapes is None else (axes, shapes)
    return jax.tree_util.tree_map_with_path(one, *trees, is_leaf=is_axes)
