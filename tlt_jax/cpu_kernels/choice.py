"""Whether a program may use the native kernels."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.cpu_kernels import ffi, gumbel, product

CHOICES = ("auto", "xla", "native")


def choose(setting: str, devices: Iterable[jax.Device], dtype) -> str:
    """Settle which kernels a program has, and register them if it has native ones.

    Args:
      setting: `auto`, `xla` or `native`.
      devices: that the program runs on.
      dtype: of its weights and activations.

    Returns:
      `xla` or `native`.

    Raises:
      ValueError: `setting` is none of the three, or native kernels cannot be had.
    """
    if setting not in CHOICES:
        raise ValueError(f"cpu_kernels={setting!r}: use one of {', '.join(CHOICES)}.")
    if setting == "xla":
        return "xla"
    obstacle = _obstacle(list(np.ravel(devices)), jnp.dtype(dtype))
    if obstacle and setting == "native":
        raise ValueError(f"cpu_kernels='native' {obstacle}: use 'auto' or 'xla'.")
    if obstacle:
        return "xla"
    # Here, and not by the threads that trace programs: a target is registered once.
    product.register()
    gumbel.register()
    return "native"


def _obstacle(devices: list[jax.Device], dtype: np.dtype) -> str | None:
    if len(devices) > 1:
        return f"cannot be split over {len(devices)} devices"
    if devices[0].platform != "cpu":
        return f"was asked for on {devices[0].device_kind}, which is no CPU"
    if dtype != jnp.float32:
        return f"computes float32, not {dtype}"
    if not ffi.is_supported():
        return "needs Linux or macOS with 64 bits"
    return None
