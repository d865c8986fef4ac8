"""The parts of a decoder layer that are not attention: norm, rotary angles, MLP."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tlt_jax.cpu_kernels import product as cpu_product
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import params as model_params
from tlt_jax.pallas_kernels.one_column import api as one_column
from tlt_jax.types import Array

# The native product wins up to this many columns, see experiments/LOG.md.
_MOST_NATIVE_COLUMNS = 256


def precision(dtype) -> lax.Precision:
    """Products of float32 are computed as such; GPUs and TPUs would round them."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def product(
    weight: Array,
    x: Array,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
    bias: Array | None = None,
    *,
    norm: tuple[Array, float] | None = None,
    residual: Array | None = None,
) -> Array:
    """Multiply columns by a weight, in their dtype.

    Args:
      weight: `[*out, in]`.
      x: `[in, B, T]`.
      kernels: whose native products take the kernel for few columns on CPUs, which
        has no derivative and cannot be partitioned; see `cpu_kernels.product`. One
        column on a GPU has a kernel for all of this, see `one_column`.
      bias: `[*out]`, or None.
      norm: scale and epsilon of `rms_norm`, which `x` passes first; None: it does not.
      residual: `[*out, B, T]`, what the result is added to, or None.

    Returns:
      `[*out, B, T]`.
    """
    if kernels.one_column is not None and one_column.takes(weight, x):
        return one_column.product(
            weight.astype(x.dtype),
            x,
            implementation=kernels.one_column,
            norm=norm,
            bias=bias,
            residual=residual,
        )
    if norm is not None:
        x = rms_norm(x, *norm)
    multiply = cpu_product.product if takes_native(kernels, x) else _product
    y = multiply(weight.astype(x.dtype), x)
    y = y if bias is None else y + bias.astype(x.dtype)[..., None, None]
    return y if residual is None else residual + y


def takes_native(kernels: kernels_lib.Kernels, x: Array) -> bool:
    """Tell whether columns `[in, ...]` are few enough for the native product."""
    return kernels.is_native and math.prod(x.shape[1:]) <= _MOST_NATIVE_COLUMNS


@jax.custom_vjp
def _product(weight: Array, x: Array) -> Array:
    """Multiply; `product` for compilers.

    Its gradient states both products in the order of their results: derived ones are
    transposed afterwards, and compilers for CPUs then copy operands element by element.
    """
    return jnp.tensordot(weight, x, axes=1, precision=precision(x.dtype))


def _product_forward(weight, x):
    return _product(weight, x), (weight, x)


def _product_backward(saved, grad):
    weight, x = saved
    prec = precision(x.dtype)
    # weight [*out, in], x [in, B, T], grad [*out, B, T]: sum over all that the other
    # factor's gradient has not.
    out = tuple(range(weight.ndim - 1))
    columns = tuple(range(weight.ndim - 1, grad.ndim))
    grad_x = jnp.tensordot(weight, grad, axes=(out, out), precision=prec)
    grad_weight = jnp.tensordot(grad, x, axes=(columns, (1, 2)), precision=prec)
    return grad_weight, grad_x


_product.defvjp(_product_forward, _product_backward)


def rms_norm(x: Array, scale: Array, eps: float, axis: int = 0) -> Array:
    """Divide by the root mean square over `axis` and scale.

    The mean is taken in float32 whatever the activations are.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, eq. 4.

    Args:
      x: features along `axis`; the result is alike.
      scale: `[x.shape[axis]]`.
      eps: added to the mean square.
      axis: the feature axis.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=axis, keepdims=True)
    # One number for each feature, whichever axis they stand on.
    shape = [1] * x.ndim
    shape[axis] = -1
    normed = x32 * lax.rsqrt(mean_square + eps)
    return (normed * scale.astype(jnp.float32).reshape(shape)).astype(x.dtype)


def _rope_frequencies(cfg: model_config.ModelConfig) -> tuple[np.ndarray, float]:
    """Compute the rotary frequencies of `cfg`, stretched as `rope_scaling` says.

    Reference: Su et al., RoFormer, 2021; Peng et al., YaRN, 2023, section 3; the
    llama3 form is described in the Llama 3.1 model release.

    Returns:
      Angular frequencies `[H / 2] float32` in radians per position, and the factor on
      cos and sin (1 but for YaRN).
    """
    dim, theta = cfg.head_dim, cfg.rope_theta
    freqs = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling, factor = cfg.rope_scaling, 1.0
    if scaling is None:
        pass
    elif scaling.kind == "linear":
        freqs = freqs / scaling.factor
    elif scaling.kind == "llama3":
        freqs = llama3_frequencies(freqs, scaling)
    elif scaling.kind == "yarn":
        freqs, factor = _yarn(freqs, scaling, dim, theta)
    else:
        raise ValueError(
            f"rope_scaling.kind={scaling.kind!r} is not computed here: use linear, "
            "llama3 or yarn."
        )
    return freqs.astype(np.float32), factor


def llama3_frequencies(
    freqs: np.ndarray, scaling: model_config.RopeScaling
) -> np.ndarray:
    """Stretch angular frequencies, in radians per position, as Llama 3 does."""
    # What turns often within the context of pre-training stays as it is; what never
    # comes round is stretched, and between them a mean of both is taken.
    turns = scaling.original_max_positions * freqs / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * freqs + (1 - keep) * freqs / scaling.factor


def _yarn(
    freqs: np.ndarray, scaling: model_config.RopeScaling, dim: int, theta: float
) -> tuple[np.ndarray, float]:
    def dimension_of(rotations: float) -> float:
        wavelength_ratio = scaling.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(wavelength_ratio) / (2 * math.log(theta))

    # As for llama3, but the ramp is straight in the dimension's index.
    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, and no division by zero
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return freqs * (1 - ramp) + freqs / scaling.factor * ramp, factor


def rope_tables(cfg: model_config.ModelConfig, positions: Array) -> tuple[Array, Array]:
    """Tabulate cos and sin of every rotary angle.

    Positions are `[B, T] int32`, the tables `[H / 2, B, T] float32`.
    """
    freqs, factor = _rope_frequencies(cfg)
    # [H / 2, B, T]: features first, as the activations that they turn.
    angles = jnp.asarray(freqs)[:, None, None] * positions.astype(jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs (i, i + H/2) of every head, `[..., H, B, T]`, by their angles.

    See `rope_tables` for the arguments `cos` and `sin`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-3)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-3
    )
    return turned.astype(x.dtype)


def mlp(
    layer: model_params.LayerParams,
    x: Array,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
    *,
    norm: tuple[Array, float] | None = None,
    residual: Array | None = None,
) -> Array:
    """Apply the gated feed-forward block, down(silu(gate x) * up x).

    Reference: Shazeer, GLU Variants Improve Transformer, 2020, section 2.

    Args:
      layer, kernels: one layer's weights, and see `product`.
      x: `[D, B, T]`; the result is as large.
      norm, residual: see `product`.
    """
    if kernels.one_column is not None and one_column.takes(layer.gate_up, x):
        gated_FBT = one_column.product(
            layer.gate_up.astype(x.dtype),
            x,
            implementation=kernels.one_column,
            norm=norm,
            bias=layer.gate_up_bias,
            gated=True,
        )
    else:
        # Both projections in one product: [2, F, B, T], gate first.
        hidden_2FBT = product(layer.gate_up, x, kernels, layer.gate_up_bias, norm=norm)
        # A split, not two slices: its gradient is one concatenation.
        gate, up = jnp.split(hidden_2FBT, 2)
        gated_FBT = jax.nn.silu(gate[0]) * up[0]
    return product(layer.down, gated_FBT, kernels, layer.down_bias, residual=residual)
