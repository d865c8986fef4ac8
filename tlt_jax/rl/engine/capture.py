"""Texts for the drafter's training, read from the pages that the rollout wrote anyway.

Prefill, decoding and verification leave the target's features beside the keys: a text
that ends has all but those of its last token, which was drawn and never fed, and which
no training position needs. No forward of the target is spent on them, and decoding goes
on while they come to the host: the reads are enqueued before the pages are written
anew, and a thread lays out what they bring.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax.models import config as model_config
from tlt_jax.rl.engine import scheduler
from tlt_jax.specdec.texts import layout

# A multiplier of Knuth's: consecutive ids are spread evenly.
_SPREAD = 2654435761
# Of texts that are on their way to the host; a run waits for the oldest above that.
MOST_UNDERWAY_BYTES = 2**30


def is_chosen(request_id: int, frac: float) -> bool:
    """Tell whether a request's text is captured: `frac` of all, always the same."""
    return (request_id * _SPREAD) % 2**32 < frac * 2**32


def known_pages(row: scheduler.Row, page_size: int) -> list[int]:
    """Return those of a finished row's pages that hold its text."""
    return row.pages[: -(-min(row.length, len(row.text())) // page_size)]


def routes(
    row: scheduler.Row, pages: Sequence[Any], cfg: model_config.ModelConfig
) -> np.ndarray:
    """Return a finished row's routes, see `types.Completion`.

    `pages`, those of `known_pages`, each `[page_size, >= L x C]`, keep them.
    """
    columns = np.concatenate(pages)[: len(row.text()) - 1]
    shape = cfg.num_layers, cfg.experts.per_token
    return np.ascontiguousarray(columns[:, : shape[0] * shape[1]]).reshape(-1, *shape)


@dataclasses.dataclass(frozen=True)
class Finished:
    """What is known of a finished row beside its features.

    Attributes:
      text_id, tokens, response_start, key, version: see `layout.Record`.
      num_known: positions whose features were cached.
      num_fused: features of a position that a drafter fuses; the last features are
        behind them. 0: they are all there is.
    """

    text_id: int
    tokens: np.ndarray
    response_start: int
    key: np.ndarray
    version: int
    num_known: int
    num_fused: int

    @classmethod
    def of(
        cls, row: scheduler.Row, *, num_fused: int, key: np.ndarray, version: int
    ) -> "Finished":
        """Take from a row, which may be given up then, what `record` needs."""
        tokens = row.text()
        return cls(
            text_id=row.request.request_id,
            tokens=tokens,
            response_start=len(row.request.prompt),
            key=key,
            version=version,
            num_known=min(row.length, len(tokens)),
            num_fused=num_fused,
        )


def record(text: Finished, pages: Iterable[Any]) -> layout.Record:
    """Make a record of a finished text.

    `pages`, those of `known_pages`, each `[page_size, F]`, keep its features: arrays of
    the host, or of devices, which are waited for one by one. The last token's features
    are zeros.
    """
    known, start = np.empty((0, 0)), 0
    for page in map(np.asarray, pages):
        if not start:
            known = np.empty((len(text.tokens), page.shape[1]), page.dtype)
        part = known[start : min(start + len(page), text.num_known)]
        part[:] = page[: len(part)]
        start += len(page)
    known[text.num_known :] = 0
    num_fused = text.num_fused
    return layout.Record(
        text_id=text.text_id,
        tokens=text.tokens,
        response_start=text.response_start,
        hidden=known[:, num_fused:],
        features=known[:, :num_fused] if num_fused else None,
        key=text.key,
        version=text.version,
    )


class Delivery:
    """Brings texts to the host and hands them on, in their order, beside decoding.

    Use it as a context, which ends when all are handed on; an error of handing on is
    raised by the next `add`, or there.
    """

    def __init__(self, on_text: Callable[[layout.Record], None] | None):
        """Hand texts to `on_text`; None: there will be none."""
        self._on_text = on_text
        self._underway: list[tuple[concurrent.futures.Future, int]] = []
        self._has_failed = False
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "capture")

    def __enter__(self) -> "Delivery":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            self._thread.shutdown(cancel_futures=True)

    def add(self, text: Finished, pages: Iterable[jax.Array]) -> float:
        """Take a text and its pages, see `record`; return seconds that this took."""
        started = time.perf_counter()
        pages = collections.deque(pages)
        for page in pages:
            page.copy_to_host_async()
        num_bytes = sum(page.nbytes for page in pages)
        task = self._thread.submit(self._hand_on, text, pages)
        self._underway.append((task, num_bytes))
        self._settle(MOST_UNDERWAY_BYTES)
        return time.perf_counter() - started

    def _hand_on(self, text: Finished, pages: collections.deque) -> None:
        if self._has_failed:
            return  # Behind an error nothing is handed on.
        # Each page is given up when it is there.
        given = (pages.popleft() for _ in range(len(pages)))
        try:
            self._on_text(record(text, given))
        except BaseException:
            self._has_failed = True
            raise

    def _settle(self, most_bytes: int) -> None:
        """Wait until at most so many bytes are underway; raise the first error."""
        while self._underway:
            task, _ = self._underway[0]
            num_bytes = sum(size for _, size in self._underway)
            if num_bytes <= most_bytes and not task.done():
                return
            task.result()
            self._underway.pop(0)
