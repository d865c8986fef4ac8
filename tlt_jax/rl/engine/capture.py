"""Texts for the drafter's training, read from the pages that the rollout wrote anyway.

Prefill, decoding and verification leave the target's features beside the keys: a text
that ends has all but those of its last token, which was drawn and never fed, and which
no training position needs. No forward of the target is spent on them.
"""

import numpy as np

from tlt_jax.models import config as model_config
from tlt_jax.rl.engine import scheduler
from tlt_jax.specdec.texts import layout

# A multiplier of Knuth's: consecutive ids are spread evenly.
_SPREAD = 2654435761


def is_chosen(request_id: int, frac: float) -> bool:
    """Tell whether a request's text is captured: `frac` of all, always the same."""
    return (request_id * _SPREAD) % 2**32 < frac * 2**32


def routes(
    row: scheduler.Row, pages: np.ndarray, cfg: model_config.ModelConfig
) -> np.ndarray:
    """Return a finished row's routes, see `types.Completion`.

    `pages [>= pages of the row, >= L x C, page_size]` are what its pages keep of them.
    """
    count, size = len(row.text()) - 1, pages.shape[2]
    columns = np.moveaxis(pages[: -(-count // size)], 2, 1)
    columns = columns.reshape(-1, pages.shape[1])[:count]
    shape = cfg.num_layers, cfg.experts.per_token
    return np.ascontiguousarray(columns[:, : shape[0] * shape[1]]).reshape(-1, *shape)


def record(
    row: scheduler.Row,
    pages: np.ndarray,
    *,
    num_fused: int,
    key: np.ndarray,
    version: int,
) -> layout.Record:
    """Make a record of a finished row.

    Args:
      row: it still holds its pages.
      pages: `[>= pages of the row, F, page_size]`, what they keep of the features.
      num_fused: rows of F that a drafter fuses; the last features are behind them. 0:
        they are all there is.
      key: `[2] uint32`, the noise key.
      version: of the target's weights.

    Returns:
      The record; the last token's features are zeros.
    """
    tokens = row.text()
    num_known, size = min(row.length, len(tokens)), pages.shape[2]
    known = np.empty((len(tokens), pages.shape[1]), pages.dtype)
    # Page by page and once: the worker's next decode call waits for this.
    for start, page in zip(range(0, num_known, size), pages, strict=False):
        part = known[start : min(start + size, num_known)]
        part[:] = page.T[: len(part)]
    known[num_known:] = 0
    return layout.Record(
        text_id=row.request.request_id,
        tokens=tokens,
        response_start=len(row.request.prompt),
        hidden=known[:, num_fused:],
        features=known[:, :num_fused] if num_fused else None,
        key=key,
        version=version,
    )
