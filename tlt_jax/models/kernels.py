"""Which kernels a program computes with, settled before it is traced."""

import dataclasses
from collections.abc import Callable

import jax
from jax import lax

from tlt_jax.cpu_kernels import attention as cpu_attention
from tlt_jax.cpu_kernels import choice, grouped, gumbel
from tlt_jax.pallas_kernels.one_column import api as one_column_api
from tlt_jax.pallas_kernels.verify_attention import api as verify_attention
from tlt_jax.pallas_kernels.verify_attention import page_layout
from tlt_jax.runtime import sharding
from tlt_jax.types import Array

_INTERPRETED = "_interpreted"
_KERNELS = ("mosaic_tpu", "triton_gpu")
_NATIVE = "native_cpu"
ATTENTION_CHOICES = (
    *("auto", "portable", _NATIVE, *_KERNELS),
    *(name + _INTERPRETED for name in _KERNELS),
)


@dataclasses.dataclass(frozen=True)
class Split:
    """Devices of a program, and which of their axes split what."""

    mesh: jax.sharding.Mesh
    rules: sharding.ShardingRules


@dataclasses.dataclass(frozen=True)
class Flash:
    """A library's kernel of attention in training, see `flash_attention`.

    Attributes:
      name: `splash` or `cudnn`.
      interpret: run splash step by step on a CPU: slow, for tests.
      mesh: devices that split rows and kv heads; None: one.
      rules: which of its axes split what.
    """

    name: str
    interpret: bool = False
    mesh: jax.sharding.Mesh | None = None
    rules: sharding.ShardingRules = sharding.ShardingRules()


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels of a program; what has a kernel but `training` has no derivative.

    Attributes:
      products: of weights and few columns: `xla`, or `native` for programs on one CPU
        device in float32, see `cpu_kernels.choice`.
      ragged: products of many experts are `jax.lax.ragged_dot`, which is for
        accelerators; see `models.experts`.
      split: devices of the program, where there are several; experts and rows are
        divided among them by hand. None: one device.
      attention: over a paged cache; None: the portable walk over pages.
      one_column: products of a single column with what stands around them, by one of
        `one_column.IMPLEMENTATIONS`, for programs on one GPU; None: as others are.
      training: attention of packed rows without a past, each prompt of which has one
        answer; None: the portable form, which takes trees.
      native_attention: where shapes allow it, by the native kernel instead, for the
        same programs as native products; see `cpu_kernels.attention`.
      checked: page tables, lengths, positions and ancestors are checked by the host in
        every forward, before attention reads by them; slow, for looking for errors.
      noise: Gumbel noise of (keys, positions, vocab_size), as `noise.gumbel` describes
        it; None: its portable form, and so below.
      draw: tokens of (scores, noise, rows), see `sampling.Law.draw`.
      rank: best tokens, their shares and slopes, of (scores, noise, rows, sharpness,
        tau), see `specdec.proposers.expansion` and `specdec.calibration`.
    """

    products: str = "xla"
    ragged: bool = False
    split: Split | None = None
    attention: verify_attention.Implementation | None = None
    one_column: str | None = None
    training: Flash | None = None
    native_attention: bool = False
    checked: bool = False
    noise: Callable[[Array, Array, int], Array] | None = None
    draw: Callable[[Array, Array, Array], Array] | None = None
    rank: Callable[..., tuple[Array, ...]] | None = None

    @property
    def is_native(self) -> bool:
        """Whether the program takes native products for CPUs where there are some."""
        return self.products == "native"

    @property
    def splits_vocab(self) -> bool:
        """Whether every device has a part of the vocabulary."""
        split = self.split
        return (
            split is not None and sharding.num_parts(split.mesh, split.rules.vocab) > 1
        )

    def whole(self, array: Array) -> Array:
        """Have every device hold all of an array, whose parts several hold."""
        if self.split is None:
            return array
        everywhere = sharding.replicated(self.split.mesh)
        return lax.with_sharding_constraint(array, everywhere)

    def packing(self, page_size: int, head_dim: int) -> int:
        """Say how pages must lie for the attention; see `page_layout.packing`."""
        name = None if self.attention is None else self.attention.name
        return page_layout.packing(name, page_size, head_dim)


PORTABLE = Kernels()
NATIVE = Kernels("native", noise=gumbel.gumbel, draw=gumbel.draw, rank=gumbel.rank)


def for_experts(kernels: Kernels, split: Split, *, trains: bool = False) -> Kernels:
    """Settle how a program on these devices multiplies by a mixture's experts.

    `trains` is for the update's many rows: compilers for GPUs expand `ragged_dot` to
    all experts times all rows, which its memory does not hold.
    """
    if kernels.is_native:
        # Here, and not by the threads that trace programs: it is registered once.
        grouped.register()
    platform = split.mesh.devices.flat[0].platform
    return dataclasses.replace(
        kernels,
        ragged=platform == "tpu" or (platform != "cpu" and not trains),
        split=_if_several(split),
    )


def _if_several(split: Split) -> Split | None:
    return split if split.mesh.devices.size > 1 else None


def choose(
    cpu_kernels: str,
    attention: str,
    mesh: jax.sharding.Mesh,
    rules: sharding.ShardingRules,
    dtype,
    *,
    checked: bool = False,
) -> Kernels:
    """Settle the kernels of a program.

    Args:
      cpu_kernels: see `cpu_kernels.choice.choose`.
      attention: `auto`: the kernel of the devices' platform, where it has one (on CPUs
        `native_cpu`, with native products only), else `portable`; or one by name. A
        name with `_interpreted` behind it runs a kernel's
        program step by step on CPUs, for tests.
      mesh, rules: devices that the program runs on, and which axes split kv heads.
      dtype: of weights and activations.
      checked: see `Kernels`.

    Raises:
      ValueError: a choice is not known, or cannot be had on these devices.
    """
    products = choice.choose(cpu_kernels, mesh.devices, dtype)
    is_native = products == "native" and attention in ("auto", _NATIVE)
    if attention == _NATIVE and not is_native:
        raise ValueError(
            f"attention={_NATIVE!r} goes with native products, which this program "
            f"does not have (cpu_kernels={cpu_kernels!r}, {dtype}, "
            f"{mesh.devices.size} devices): use 'auto'."
        )
    base = NATIVE if products == "native" else PORTABLE
    if is_native:
        cpu_attention.register()
        return dataclasses.replace(base, native_attention=True, checked=checked)
    own = verify_attention.for_platform(mesh.devices.flat[0].platform)
    fused = own == "triton_gpu" and mesh.devices.size == 1 and cpu_kernels == "auto"
    return dataclasses.replace(
        base,
        attention=_choose_attention(attention, mesh, rules),
        split=_if_several(Split(mesh, rules)),
        checked=checked,
        one_column=one_column_api.IMPLEMENTATIONS[0] if fused else None,
    )


def _choose_attention(
    asked: str, mesh: jax.sharding.Mesh, rules: sharding.ShardingRules
) -> verify_attention.Implementation | None:
    if asked not in ATTENTION_CHOICES:
        raise ValueError(
            f"attention={asked!r}: use one of {', '.join(ATTENTION_CHOICES)}."
        )
    device = mesh.devices.flat[0]
    available = verify_attention.for_platform(device.platform)
    name = available or "portable" if asked == "auto" else asked
    if name == "portable":
        return None
    interpret = name.endswith(_INTERPRETED)
    name = name.removesuffix(_INTERPRETED)
    if interpret != (device.platform == "cpu") or not interpret and name != available:
        works = [available] if available else [f"{n}{_INTERPRETED}" for n in _KERNELS]
        raise ValueError(
            f"attention={asked!r} was asked for on {device.device_kind}, where "
            f"'auto', 'portable' and {', '.join(map(repr, works))} work."
        )
    # That of one device is the same for all.
    several = mesh if mesh.devices.size > 1 else None
    return verify_attention.Implementation(name, interpret, several, rules)
