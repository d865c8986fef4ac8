"""Training attention by a library's flash kernel: splash on TPUs, cuDNN on GPUs.

Such a kernel keeps scores on the chip, where the portable walk over tiles writes them
to memory in float32: at 32K columns most of an update's bytes. It knows sequences that
lie side by side in a row and see only themselves, and no trees: answers then have a
copy of their prompt each, where that costs less (`repeats_prompts`).

Reference: Dao et al., FlashAttention, 2022, algorithms 1 and 4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas.ops.tpu import splash_attention

from tlt_jax.models import attention
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import params as model_params
from tlt_jax.runtime import sharding
from tlt_jax.types import Array

CHOICES = ("auto", "portable", "splash", "cudnn")
# A row holds this many sequences at most: cuDNN is compiled for their number.
MOST_SEQUENCES = 64
_OF_PLATFORM = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
# Queries and keys of splash's tiles: few rows of a chip's vector memory, long loops.
_BLOCK = 512
_LANES = 128
# What a score costs beside its products: the portable form writes and reads its tile
# six times in three passes, float32 and bfloat16, 60 bytes; at 180 operations a byte,
# which are a v5p's and an H200's.
_OPERATIONS_PER_SCORE = 10_800


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long what a run trains on may be, in tokens.

    Attributes:
      prompt, answer: the longest of each.
      group_size: answers of a prompt.
      row: of a packed row.
    """

    prompt: int
    answer: int
    group_size: int
    row: int


def choose(
    asked: str,
    model: model_config.ModelConfig,
    dtype,
    mesh: jax.sharding.Mesh,
    rules: sharding.ShardingRules,
    lengths: Lengths,
) -> kernels_lib.Flash | None:
    """Settle what computes attention in training; None: the portable form.

    `auto` takes the devices' kernel where it can be had and `repeats_prompts` says that
    it costs less; a name takes what it names.

    Raises:
      ValueError: a kernel that was asked for by name cannot be had.
    """
    if asked not in CHOICES:
        raise ValueError(
            f"learner.attention={asked!r}: use one of {', '.join(CHOICES)}."
        )
    device = mesh.devices.flat[0]
    own = _OF_PLATFORM.get(device.platform)
    name = own if asked == "auto" else asked
    if name in (None, "portable"):
        return None
    obstacle = _obstacle(name, own, model, dtype, device)
    if asked == "auto" and (obstacle or not repeats_prompts(model, lengths)):
        return None
    if obstacle:
        raise ValueError(
            f"learner.attention={asked!r} {obstacle}: use 'auto' or 'portable'."
        )
    return kernels_lib.Flash(name, mesh=mesh, rules=rules)


def _obstacle(name, own, model, dtype, device) -> str | None:
    """Say why a kernel cannot be had, if so; continues the setting's name."""
    if name != own:
        where = {"splash": "TPUs", "cudnn": "NVIDIA GPUs"}[name]
        return f"is for {where}, and this is {device.device_kind}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"computes in bfloat16, and precision is {jnp.dtype(dtype).name}"
    if any(model.windowed_layers):
        return "knows no layers with windows of their own, which this model has"
    if name == "cudnn" and (model.head_dim % 8 or model.head_dim > 128):
        return (
            "takes head dimensions of at most 128 in steps of 8, and this model's is "
            f"{model.head_dim}"
        )
    if name == "cudnn" and float(device.compute_capability) < 9:
        return (
            "takes packed rows on Hopper GPUs and later ones, and this is "
            f"{device.device_kind}"
        )
    return None


def repeats_prompts(model: model_config.ModelConfig, lengths: Lengths) -> bool:
    """Tell whether a copy of the prompt for every answer, and a kernel, cost less.

    Counted are the operations of a group of the longest texts: every column's products
    with the weights, forward, again and backward, and its scores with half a row. A
    tree computes each prompt once a row, but a score of the portable form moves some
    60 bytes, which count as what a chip could compute meanwhile.
    """
    weights = model_params.count(model) - model.vocab_size * model.d_model
    products = 8 * weights
    scores = model.num_layers * model.num_heads * lengths.row / 2
    kernel = scores * 18 * model.head_dim
    portable = kernel + scores * _OPERATIONS_PER_SCORE
    # Answers that share a row share its copy of the prompt.
    text = lengths.prompt + lengths.answer
    room = max((lengths.row - lengths.prompt) // lengths.answer, 1)
    copies = -(-lengths.group_size // room)
    answers = lengths.group_size * lengths.answer
    tree = (copies * lengths.prompt + answers) * (products + portable)
    return lengths.group_size * text * (products + kernel) < tree


@struct.dataclass
class Sequences:
    """Which sequence each column of packed rows is of.

    Attributes:
      ids: `[B, T] int32`, rising, -1 is padding.
      starts: `[B, M + 1] int32`, the first columns of M sequences, -1 where there are
        fewer.
      counts: `[B, M] int32`, their columns, -1 where there are fewer.
    """

    ids: Array
    starts: Array
    counts: Array


def sequences(visibility: attention.Visibility) -> Sequences:
    """Find the sequences of rows that hold one answer behind every prompt.

    What has one prompt is then one sequence, so `prefix` tells them apart; there are at
    most `MOST_SEQUENCES` in a row, and padding behind them.
    """
    ids_BT = visibility.prefix
    first_BT = jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)))
    number_BT = jnp.where(ids_BT >= 0, jnp.cumsum(first_BT, axis=1), -1)
    own_BMT = number_BT[:, None] == jnp.arange(MOST_SEQUENCES)[:, None]
    counts_BM = jnp.sum(own_BMT, axis=2, dtype=jnp.int32)
    there_BM = counts_BM > 0
    starts_BM = jnp.where(there_BM, jnp.argmax(own_BMT, axis=2), -1)
    return Sequences(
        ids=number_BT.astype(jnp.int32),
        starts=jnp.pad(
            starts_BM.astype(jnp.int32), ((0, 0), (0, 1)), constant_values=-1
        ),
        counts=jnp.where(there_BM, counts_BM, -1),
    )


def attend(
    query: Array,
    keys: Array,
    values: Array,
    within: Sequences,
    *,
    scale: float,
    flash: kernels_lib.Flash,
) -> attention.Partial:
    """Attend causally within sequences; the part is normalised already.

    Args:
      query: `[B, K, G, T, H]`.
      keys, values: `[B, K, H, T]`.
      within: the sequences.
      scale: multiplies the scores.
      flash: what computes; it has a derivative.

    Returns:
      A part over `[B, K, M]` queries for `attention.finish` alone; padding gets zeros,
      and gives none of its own to keys, values and queries in the backward pass.
    """
    run = functools.partial(
        _splash if flash.name == "splash" else _cudnn, scale=scale, flash=flash
    )
    if flash.mesh is not None and flash.mesh.size > 1:
        run = _spread(run, flash, query.shape)
    out_BKGTH = run(query, keys, values, within)
    maximum = jnp.zeros(out_BKGTH.shape[:-1], jnp.float32)
    part = attention.Partial(out_BKGTH.astype(jnp.float32), maximum, maximum + 1)
    return attention.merge_queries(part)


def _spread(run, flash: kernels_lib.Flash, shape):
    """Run on each device with its rows and kv heads."""

    def split(*axes):
        # Whole where rows or heads do not divide.
        return sharding.named(
            flash.mesh, flash.rules, axes, shape[: len(axes)], replicate=True
        ).spec

    by_head, by_row = split("batch", "kv_heads"), split("batch")
    return jax.shard_map(
        run,
        mesh=flash.mesh,
        in_specs=(by_head, by_head, by_head, by_row),
        out_specs=by_head,
        check_vma=False,
    )


def _splash(
    query, keys, values, within: Sequences, *, scale, flash: kernels_lib.Flash
) -> Array:
    batch, num_kv, group, num_tokens, head_dim = query.shape
    num_heads = num_kv * group
    # The kernel's tiles are whole, and its lanes; what is filled up sees itself alone.
    block = min(_BLOCK, -(-num_tokens // _LANES) * _LANES)
    spare, narrow = -num_tokens % block, -head_dim % _LANES
    room = ((0, 0), (0, 0), (0, spare), (0, narrow))
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    query_BNTH = jnp.pad(scaled.reshape(batch, num_heads, num_tokens, head_dim), room)
    keys_BKTH, values_BKTH = (jnp.pad(x.swapaxes(2, 3), room) for x in (keys, values))
    ids_BT = jnp.pad(within.ids, ((0, 0), (0, spare)), constant_values=-1)
    length = num_tokens + spare
    mask = splash_attention.CausalMask((length, length))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * num_heads),
        block_sizes=splash_attention.BlockSizes(
            *(block,) * 8,
        ),
        interpret=flash.interpret,
    )

    def one_row(query, keys, values, ids):
        return kernel(query, keys, values, splash_attention.SegmentIds(ids, ids))

    out_BNTH = jax.vmap(one_row)(query_BNTH, keys_BKTH, values_BKTH, ids_BT)
    out_BNTH = out_BNTH[:, :, :num_tokens, :head_dim]
    # The kernel's padding sees itself; nobody sees it, so its slopes are zero.
    out_BNTH = jnp.where((within.ids >= 0)[:, None, :, None], out_BNTH, 0)
    return out_BNTH.reshape(query.shape)


def _cudnn(
    query, keys, values, within: Sequences, *, scale, flash: kernels_lib.Flash
) -> Array:
    del flash
    # What `jax.nn.dot_product_attention(implementation="cudnn")` calls; that has no
    # argument for several sequences in a row, and a mask would be an array T x T.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    batch, num_kv, group, num_tokens, head_dim = query.shape
    # The kernel leaves padding unwritten, in results and in slopes: both are cut here.
    is_token_BT11 = (within.ids >= 0)[:, :, None, None]

    def cut(x_BTNH):
        return jnp.where(is_token_BT11, x_BTNH, 0)

    query_BTKGH = query.transpose(0, 3, 1, 2, 4)
    query_BTNH = cut(query_BTKGH.reshape(batch, num_tokens, num_kv * group, head_dim))
    keys_BTKH, values_BTKH = (cut(x.transpose(0, 3, 1, 2)) for x in (keys, values))
    out_BTNH = cudnn.dot_product_attention(
        *(query_BTNH, keys_BTKH, values_BTKH),
        q_seqlen=within.counts,
        kv_seqlen=within.counts,
        q_offsets=within.starts,
        kv_offsets=within.starts,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
    out_BTKGH = cut(out_BTNH).reshape(query_BTKGH.shape)
    return out_BTKGH.transpose(0, 2, 3, 1, 4)
