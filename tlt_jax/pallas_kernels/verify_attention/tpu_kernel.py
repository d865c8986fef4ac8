"""The kernel for TPUs: one step of its grid.

A step takes one block of one row's queries: R = tokens x group rows, packed so that all
query heads of a kv head share its pages. It walks the row's pages in blocks of
megabytes, which is what hides the latency of HBM: while one is worked on, the next is
on its way, be it the row's or the next row's first. Then come the fresh keys. How pages
lie stands in `pallas_mosaic_tpu`.
"""

import dataclasses
import functools
import typing

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tlt_jax.pallas_kernels.verify_attention import (
    arguments,
    reference,
    tpu_plan,
    tpu_products,
)
from tlt_jax.types import Array

_HIDDEN = reference.HIDDEN


class Operands(typing.NamedTuple):
    """What the kernel reads: arrays outside of it, references inside.

    Attributes:
      layer, window: `[1] int32`.
      lengths: `[B] int32`.
      table: `[B x max_pages] int32`.
      starts: `[B x num_blocks] int32`, the first slot that a block sees.
      query: `[B, K, num_blocks, packing x R, part]`, a block of it in a step.
      sight: `[B, num_blocks, R, n] int32`, likewise: a query's position, then its own
        index or its words.
      fresh_keys, fresh_values: `[B, K, packing, fresh, part]`, a row of it in a step.
      key_positions: `[B, 1, fresh] int32`, likewise.
      keys, values: pages `[L, num_pages, K, ...]` in HBM.
    """

    layer: Array
    lengths: Array
    table: Array
    starts: Array
    window: Array
    query: Array
    sight: Array
    fresh_keys: Array
    fresh_values: Array
    key_positions: Array
    keys: Array
    values: Array


class Scratch(typing.NamedTuple):
    """What the kernel keeps: shapes outside of it, references inside.

    Attributes:
      keys, values: `[2, pages, K, ...]`, two blocks of pages: one is worked on while
        the other arrives.
      maximum, normaliser: `[K, R, 128] float32`, of the running sum.
      total: `[K, packing x R, part] float32`.
      turn: `[1] int32`, which of the two blocks is worked on next.
      arrived: `[2, 2]`, semaphores of each block's keys and values.
    """

    keys: typing.Any
    values: typing.Any
    maximum: typing.Any
    normaliser: typing.Any
    total: typing.Any
    turn: typing.Any
    arrived: typing.Any


def kernel(*refs, cut: tpu_plan.Plan, const: arguments.Constants) -> None:
    """Attend with one block of one row's queries.

    Args:
      *refs: `Operands`, the output, log normalisers if asked for, `Scratch`.
      cut, const: of the call.
    """
    first, last = len(Operands._fields), -len(Scratch._fields)
    given, own = Operands(*refs[:first]), Scratch(*refs[last:])
    core, i, block = (pl.program_id(axis) for axis in range(3))
    rows_per_core = const.sizes.query_shape[0] // cut.cores
    index = i * cut.num_blocks + block
    row = core * rows_per_core + i
    length = given.lengths[row]
    step = _Step(given, own, cut, const, core, index, row, length)
    _, start, stop = step.bounds(index)

    @pl.when(index == 0)
    def _():
        own.turn[0] = 0
        step.fetch(row, start, stop, 0)

    own.maximum[...] = jnp.full_like(own.maximum, _HIDDEN)
    own.normaliser[...] = jnp.zeros_like(own.normaliser)
    own.total[...] = jnp.zeros_like(own.total)
    position = given.sight[0, 0, :, 0:1]

    num_blocks = jnp.maximum(pl.cdiv(stop - start, cut.pages), 1)

    def one_block(n, turn):
        at = start + n * cut.pages
        is_last = n + 1 == num_blocks

        @pl.when(jnp.logical_not(is_last))
        def _():
            step.fetch(row, at + cut.pages, stop, 1 - turn)

        # With the last one the next step's first is fetched.
        @pl.when(is_last & (index + 1 < step.num_steps))
        def _():
            step.fetch(*step.bounds(index + 1), 1 - turn)

        count = jnp.clip(stop - at, 0, cut.pages)

        def some_pages(k, _):
            step.add_pages(k, at, stop, turn, position)

        lax.fori_loop(0, pl.cdiv(count, cut.pages_at_once), some_pages, None)
        return 1 - turn

    own.turn[0] = lax.fori_loop(0, num_blocks, one_block, own.turn[0])

    num_tiles = cut.num_tiles
    # One tile may be narrower than the lanes: only a fixed place in them compiles.
    if const.causal and num_tiles > 1:
        num_tiles = jnp.minimum(pl.cdiv((block + 1) * cut.tokens, cut.tile), num_tiles)

    def one_tile(n, _):
        step.add_fresh(n, position)

    lax.fori_loop(0, num_tiles, one_tile, None)
    step.finish(*refs[first:last])


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step of the grid, with the running sum in its scratch.

    Attributes:
      given, own, cut, const: what it reads and keeps, and of the call.
      core, index: of the chip, and of the step among the core's.
      row, length: whose queries, and its cached slots.
    """

    given: Operands
    own: Scratch
    cut: tpu_plan.Plan
    const: arguments.Constants
    core: Array
    index: Array
    row: Array
    length: Array

    @property
    def num_steps(self) -> int:
        """Steps of a core."""
        return self._rows_per_core * self.cut.num_blocks

    @property
    def _rows_per_core(self) -> int:
        return self.const.sizes.query_shape[0] // self.cut.cores

    def bounds(self, index: Array) -> tuple[Array, Array, Array]:
        """Row of a step, its first page, and behind its last one."""
        given, page_size = self.given, self.const.sizes.page_size
        row = self.core * self._rows_per_core + index // self.cut.num_blocks
        first = given.starts[self.core * self.num_steps + index] // page_size
        stop = pl.cdiv(given.lengths[row], page_size)
        return row, jnp.minimum(first, stop), stop

    def _copies(self, row, page, turn, slot):
        given, own = self.given, self.own
        index = given.table[row * self.const.sizes.max_pages + page]
        source = (given.layer[0], index)
        pairs = ((given.keys, own.keys), (given.values, own.values))
        return tuple(
            pltpu.make_async_copy(
                pages.at[source], block.at[turn, slot], own.arrived.at[turn, i]
            )
            for i, (pages, block) in enumerate(pairs)
        )

    def fetch(self, row: Array, first: Array, stop: Array, turn: Array | int) -> None:
        """Start copying the block of a row's pages from `first` on."""

        def start(slot, _):
            for copy in self._copies(row, first + slot, turn, slot):
                copy.start()

        count = jnp.clip(stop - first, 0, self.cut.pages)
        lax.fori_loop(0, count, start, None)

    def add_pages(
        self, part: Array, at: Array, stop: Array, turn: Array, position: Array
    ) -> None:
        """Add `pages_at_once` pages of the block that begins at page `at`.

        Args:
          part: which of the block.
          at, stop: the block's first page, and behind the row's last one.
          turn: which of the two blocks in scratch.
          position: `[R, 1] int32`, of the queries.
        """
        cut, own, page_size = self.cut, self.own, self.const.sizes.page_size
        first_slot = part * cut.pages_at_once
        first_page = at + first_slot

        def arrive(slot, _):
            for copy in self._copies(self.row, at + slot, turn, slot):
                copy.wait()

        behind = jnp.minimum(first_slot + cut.pages_at_once, stop - at)
        lax.fori_loop(first_slot, behind, arrive, None)

        def position_of(j, shape, axis):
            lane = lax.broadcasted_iota(jnp.int32, shape, axis)
            if cut.packing > 1 and len(shape) == 3:
                lane = lane % page_size
            return (first_page + j) * page_size + lane

        @pl.when((first_page + cut.pages_at_once) * page_size > self.length)
        def _():
            # NaN in a slot that nobody sees would survive its weight of zero.
            for j in range(cut.pages_at_once):
                here = own.values[turn, first_slot + j]
                axis = 1 if cut.turned else 2
                readable = position_of(j, here.shape, axis) < self.length
                here = jnp.where(readable, here.astype(jnp.float32), 0.0)
                own.values[turn, first_slot + j] = here.astype(own.values.dtype)

        # Pages whose scores are one array: slots follow each other along sublanes, or
        # along the lanes that packed pages leave.
        joined = cut.pages_at_once if cut.turned else cut.packing
        visible = []
        for j in range(0, cut.pages_at_once, joined):
            slots = position_of(j, (cut.rows, joined * page_size), 1)
            mask = slots < self.length
            if self.const.windowed:
                mask = mask & (position - slots < self.given.window[0])
            visible.append(mask)

        def one_head(head):
            query = self.given.query[0, head, 0]
            scores, weigh = [], []
            for j in range(0, cut.pages_at_once, joined):
                at = (turn, pl.ds(first_slot + j, joined), head)
                key, value = (
                    block[at].astype(query.dtype) for block in (own.keys, own.values)
                )
                score, add = self._products(query, key, value)
                scores.append(score)
                weigh.append(add)
            self._add(head, scores, visible, weigh)

        self._for_heads(one_head)

    def _products(self, query, key, value):
        """Multiply queries by pages of keys; return what weighs the values, too."""
        cut, page_size = self.cut, self.const.sizes.page_size
        if cut.packing > 1:
            scores = tpu_products.packed_scores(query, key, cut, page_size)
            return scores, functools.partial(
                tpu_products.packed_sum, value=value, cut=cut, page_size=page_size
            )
        key, value = (x.reshape(-1, x.shape[-1]) for x in (key, value))
        scores = reference.dot(query, key, (1, 1 if cut.turned else 0))
        contract = (1, 0 if cut.turned else 1)
        return scores, functools.partial(
            tpu_products.weighted, value=value, contract=contract
        )

    def add_fresh(self, n: Array, position: Array) -> None:
        """Add the n-th tile of fresh keys; see `add_pages`."""
        given, cut = self.given, self.cut
        here = pl.ds(pl.multiple_of(n * cut.tile, cut.tile), cut.tile)
        column = lax.broadcasted_iota(jnp.int32, (cut.rows, cut.tile), 1)
        if self.const.causal:
            mask = column + n * cut.tile <= given.sight[0, 0, :, 1:2]
        else:
            # One tile holds all nodes.
            word = jnp.zeros((cut.rows, cut.tile), jnp.int32)
            for w in range(given.sight.shape[3] - 1):
                of_word = column // 32 == w
                word = jnp.where(of_word, given.sight[0, 0, :, w + 1 : w + 2], word)
            mask = lax.shift_right_logical(word, column % 32) & 1 == 1
        if self.const.windowed:
            distance = position - given.key_positions[0, :, here]
            mask = mask & (distance < given.window[0])

        def one_head(head):
            scores = sum(
                reference.dot(
                    given.query[0, head, 0, pl.ds(part * cut.rows, cut.rows)],
                    given.fresh_keys[0, head, part, here],
                    (1, 1),
                )
                for part in range(cut.packing)
            )

            def add(weights):
                values = given.fresh_values
                parts = (values[0, head, part, here] for part in range(cut.packing))
                sums = [tpu_products.weighted(weights, v, (1, 0)) for v in parts]
                return jnp.concatenate(sums)

            self._add(head, [scores], [mask], [add])

        self._for_heads(one_head)

    def _for_heads(self, one_head) -> None:
        num_kv = self.const.sizes.query_shape[1]
        # Heads side by side hide each other's latency; large ones have enough of their
        # own.
        unroll = num_kv if num_kv * self.cut.rows <= 1024 else 1
        lax.fori_loop(0, num_kv, lambda head, _: one_head(head), None, unroll=unroll)

    def _add(self, head, scores, visible, weigh) -> None:
        """Add parts of the keys of one head to the running sum.

        As lists: scores and masks `[R, s]`, and what weighs the parts' values.
        """
        own, packing = self.own, self.cut.packing
        scores = reference.masked(scores, visible, self.const)
        old = own.maximum[head, :, 0:1]
        new = old
        for part in scores:
            new = jnp.maximum(new, jnp.max(part, axis=1, keepdims=True))
        kept = jnp.exp(old - new)
        total = own.total[head] * _stack(kept, packing)
        normaliser = own.normaliser[head, :, 0:1] * kept
        for part, mask, add in zip(scores, visible, weigh, strict=True):
            weights = jnp.where(mask, jnp.exp(part - new), 0.0)
            normaliser += jnp.sum(weights, axis=1, keepdims=True)
            total += add(weights)
        own.total[head] = total
        own.maximum[head] = jnp.broadcast_to(new, own.maximum.shape[1:])
        own.normaliser[head] = jnp.broadcast_to(normaliser, own.normaliser.shape[1:])

    def finish(self, out, *logs) -> None:
        """Normalise; a query that saw nothing yields zeros."""
        own = self.own
        for head in range(self.const.sizes.query_shape[1]):
            normaliser = own.normaliser[head, :, 0:1]
            seen = normaliser > 0
            safe = jnp.where(seen, normaliser, 1.0)
            made = own.total[head] / _stack(safe, self.cut.packing)
            out[0, head, 0] = made.astype(out.dtype)
            for ref in logs:
                log = own.maximum[head, :, 0:1] + jnp.log(safe)
                log = jnp.where(seen, log, _HIDDEN)
                ref[0, head, 0] = jnp.broadcast_to(log, ref.shape[3:])


def _stack(x: Array, count: int) -> Array:
    return jnp.concatenate([x] * count) if count > 1 else x
