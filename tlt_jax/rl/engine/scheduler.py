"""Host-side bookkeeping of an engine: the rows, their pages.

Plain records and decisions, no arrays of a device. Rows of one prompt share the full
pages of that prompt; its last, partial page is copied for each row. A row is moved
between slots, dropped or preempted by changing lists here: keys and values stay.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from tlt_jax import types
from tlt_jax.models import kv_cache
from tlt_jax.rl.engine import request_queue
from tlt_jax.specdec.tuners import tuner


class PagePool:
    """Free pages and reference counts. Page 0 is the scratch page and never given."""

    def __init__(self, num_pages: int):
        """Start with pages 1 to `num_pages - 1` free."""
        self._free = list(range(num_pages - 1, kv_cache.SCRATCH_PAGE, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Take `count` pages, or None if there are not as many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one holder less; pages without one are free again."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)


@dataclasses.dataclass(eq=False)
class Row:
    """A request that is waiting, or being decoded if it has pages.

    Attributes:
      request: what is asked for.
      tokens, logprobs: drawn so far.
      was_drafted: for each of those whether a draft had guessed it.
      pages: held, in order of position; empty while waiting.
      length: cached positions.
      drafted: positions in the drafter's cache.
    """

    request: types.Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    was_drafted: list[bool] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    length: int = 0
    drafted: int = 0

    @property
    def pending(self) -> int:
        """The last token of the text, drawn but not cached."""
        return self.tokens[-1] if self.tokens else int(self.request.prompt[-1])

    @property
    def remaining(self) -> int:
        """Tokens that may still be drawn."""
        return self.request.max_new_tokens - len(self.tokens)

    def text(self) -> np.ndarray:
        """All token ids so far, prompt included, `[n] int32`."""
        return np.concatenate(
            [self.request.prompt, np.asarray(self.tokens, np.int32)]
        ).astype(np.int32)

    def tail(self, count: int) -> list[int]:
        """Return the last `count` token ids of the text."""
        if count <= len(self.tokens):
            return self.tokens[len(self.tokens) - count :]
        return self.text()[-count:].tolist()


@dataclasses.dataclass(frozen=True)
class Part:
    """Positions of a text that a cache is to be given: `start` to `stop`, exclusive.

    Attributes:
      text: `[n] int32`, from position 0. The target's cache is given token t at
        position t; the drafter's feature t and token t + 1, so `stop` is below n.
      start: a multiple of the page size; earlier positions are cached already.
      stop: at most n.
      pages: of the text up to `stop`, or more.
    """

    text: np.ndarray
    start: int
    stop: int
    pages: tuple[int, ...]


@dataclasses.dataclass
class Admission:
    """What the device must do before newly admitted rows can be decoded.

    Attributes:
      prompts: done first; independent of each other.
      returns: of rows that come back after preemption; they may read pages that
        `prompts` write.
      copies: (source page, target page), last.
    """

    prompts: list[Part] = dataclasses.field(default_factory=list)
    returns: list[Part] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def any(self) -> bool:
        """Tell whether there is anything to do."""
        return bool(self.prompts or self.returns or self.copies)


class Scheduler:
    """Decides which rows are decoded and which pages they use."""

    def __init__(
        self,
        source: request_queue.RequestSource,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int,
    ):
        """Begin without rows; `num_pages` includes the scratch page.

        Of the source's requests equal `prompt_id` means equal prompts, and each has
        passed `check_fits`.
        """
        self._source = source
        self._pool = PagePool(num_pages)
        self._page_size = page_size
        self._max_rows = max_rows
        # Cached pages of prompts without their last tokens, held while rows may join.
        self._prompts: dict[int, list[int]] = {}
        self.rows: list[Row] = []
        # Taken from the source, but without pages: put back, or not yet admitted.
        self.waiting: collections.deque[Row] = collections.deque()
        self.num_preempted = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait here or in the source."""
        return len(self.waiting) + self._source.num_waiting

    def admit(self, num_steps: int) -> Admission:
        """Give rows the pages for their next `num_steps` tokens; admit waiting rows.

        Rows that are decoded come first. Where pages run out for them, those admitted
        last are put back into the queue with what they have drawn: their continuation
        is the same, since noise is keyed by position (or one of the same law, by a
        chain rule). A waiting row is admitted into a
        free slot if there are pages for all of its next `num_steps` tokens, too, so
        that what is cached for it is used before it can be put back. Returns what the
        device must do, before pages are written by anything else.
        """
        self._reserve(num_steps)
        admission = Admission()
        while len(self.rows) < self._max_rows:
            if not self.waiting:
                request = self._source.take()
                if request is None:
                    break
                self.waiting.append(Row(request))
            row = self.waiting[0]
            admitted = self._admit(row, num_steps, admission)
            if not admitted and not self.rows:
                # By itself every row fits: that was checked at the start.
                self._drop(list(self._prompts))
                admitted = self._admit(row, num_steps, admission)
            if not admitted:
                break
            self.waiting.popleft()
            self.rows.append(row)
        awaited = {row.request.prompt_id for row in self.waiting}
        unused = [p for p in self._prompts if p not in awaited]
        self._drop([p for p in unused if not self._source.waits(p)])
        return admission

    def reserve_ahead(self, num_steps: int) -> bool:
        """Give every row the pages for its next `num_steps` tokens, more than admitted.

        False, with nothing changed, where another row would have to be put back for it.
        What is not used the next `admit` takes back.
        """
        lacking = [max(self._num_lacking(row, num_steps), 0) for row in self.rows]
        if sum(lacking) > self._pool.num_free:
            return False
        for row, count in zip(self.rows, lacking, strict=True):
            row.pages.extend(self._pool.take(count))
        return True

    def finish(self, row: Row) -> bool:
        """Take a finished row out and free its pages; tell whether it counts."""
        self.rows.remove(row)
        self._pool.release(row.pages)
        row.pages = []
        return self._source.finish(row.request.request_id)

    def page_table(self, rows: Sequence[Row], batch: int, max_pages: int) -> np.ndarray:
        """Tabulate pages, `[batch, max_pages] int32`, scratch where there is none."""
        table = np.full((batch, max_pages), kv_cache.SCRATCH_PAGE, np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.pages)] = row.pages
        return table

    def _reserve(self, num_steps: int) -> None:
        """Give every row the pages that its next `num_steps` tokens need, and no more.

        Those reserved ahead for a call that did not take place are others' to have.
        """
        for row in self.rows:
            kept = len(row.pages) + min(self._num_lacking(row, num_steps), 0)
            self._pool.release(row.pages[kept:])
            del row.pages[kept:]
        i = 0
        while i < len(self.rows):
            row = self.rows[i]
            pages = self._pool.take(self._num_lacking(row, num_steps))
            if pages is not None:
                row.pages.extend(pages)
                i += 1
            elif len(self.rows) > 1:
                self._preempt(self.rows[-1])
            else:
                self._drop(list(self._prompts))

    def _admit(self, row: Row, num_steps: int, admission: Admission) -> bool:
        """Give a row its pages; False, with nothing changed, where there are none."""
        page_size = self._page_size
        prompt_length = len(row.request.prompt) - 1
        length = prompt_length + len(row.tokens)
        prompt = self._prompts.get(row.request.prompt_id)
        num_prompt_pages = self._pages_for(prompt_length) if prompt is None else 0
        num_shared = prompt_length // page_size
        num_own = self._pages_for(length + min(num_steps, row.remaining)) - num_shared
        if num_prompt_pages + num_own > self._pool.num_free:
            return False
        if prompt is None:
            prompt = self._pool.take(num_prompt_pages)
            self._prompts[row.request.prompt_id] = prompt
            if prompt_length:
                text = row.request.prompt[:-1]
                admission.prompts.append(Part(text, 0, prompt_length, tuple(prompt)))
        shared = prompt[:num_shared]
        self._pool.share(shared)
        row.pages = shared + self._pool.take(num_own)
        row.length = length
        if row.tokens:
            # Comes back after preemption: what it had drawn is cached anew.
            pages = tuple(row.pages[: self._pages_for(length)])
            start, text = num_shared * page_size, row.text()[:-1]
            admission.returns.append(Part(text, start, length, pages))
        elif prompt_length % page_size:
            admission.copies.append((prompt[num_shared], row.pages[num_shared]))
        return True

    def _preempt(self, row: Row) -> None:
        self.rows.remove(row)
        self._pool.release(row.pages)
        row.pages, row.length, row.drafted = [], 0, 0
        self.waiting.appendleft(row)
        self.num_preempted += 1

    def _drop(self, prompt_ids: Iterable[int]) -> None:
        """Let go of prompts; rows that share pages keep those."""
        for prompt_id in prompt_ids:
            self._pool.release(self._prompts.pop(prompt_id))

    def _num_lacking(self, row: Row, num_steps: int) -> int:
        """Pages that a row lacks for its next tokens; below 0: it has so many over."""
        length = row.length + min(num_steps, row.remaining)
        return self._pages_for(length) - len(row.pages)

    def _pages_for(self, length: int) -> int:
        return -(-length // self._page_size)


def check_fits(request: types.Request, *, num_pages: int, page_size: int) -> None:
    """Refuse a request that no cache of this size can hold, even alone.

    The last token drawn is never cached. A prompt that ends within a page holds that
    page beside the row's copy. `num_pages` includes the scratch page.

    Raises:
      ValueError: its prompt is empty, or it may grow beyond the cache.
    """
    if len(request.prompt) == 0:
        raise ValueError(
            f"request {request.request_id} has an empty prompt: give at least "
            "one token, for example the tokenizer's bos."
        )
    prompt_length = len(request.prompt) - 1
    needed = -(-(prompt_length + request.max_new_tokens) // page_size)
    needed += prompt_length % page_size > 0
    if needed > num_pages - 1:
        raise ValueError(
            f"request {request.request_id} may grow to "
            f"{len(request.prompt) + request.max_new_tokens} positions and so "
            f"need {needed} pages of {page_size}, but the cache has "
            f"{num_pages - 1}: raise cache.num_pages or lower "
            "rollout.max_new_tokens."
        )


def buckets(max_rows: int) -> list[int]:
    """List all that `tuner.bucket_of` gives, smallest first."""
    found = [1]
    while found[-1] < max_rows:
        found.append(min(2 * found[-1], max_rows))
    return found


def finish_quota(num_rows: int, num_waiting: int, max_rows: int) -> int:
    """Decide after how many finished rows a decode call should come back.

    With rows waiting: when an eighth of the batch is free, so that prefills come in
    batches. With none: when the rest fits the next smaller bucket.
    """
    if num_waiting:
        return max(1, num_rows // 8)
    bucket = tuner.bucket_of(num_rows, max_rows)
    smaller = [b for b in buckets(max_rows) if b < bucket]
    return num_rows - smaller[-1] if smaller else num_rows
