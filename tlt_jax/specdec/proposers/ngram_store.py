"""Finished answers kept for the n-gram proposer, on the host, in bounded memory."""

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from tlt_jax.specdec.proposers import ngram


class NgramStore:
    """The newest answers of each prompt, the oldest of all dropped when it is full.

    An answer is kept behind the last `context` tokens of its prompt: where answers
    begin a row has nothing else to be recognised by. All that is kept of all prompts,
    contexts included, are `max_tokens` at most.
    """

    def __init__(self, max_texts_per_prompt: int, max_tokens: int, context: int = 8):
        """Make an empty store.

        Raises:
          ValueError: a bound leaves no room for anything.
        """
        if max_texts_per_prompt < 1:
            raise ValueError(
                f"max_texts_per_prompt={max_texts_per_prompt} keeps no answer: give at "
                "least 1, or do without the store."
            )
        if context < 0 or max_tokens <= context:
            raise ValueError(
                f"max_tokens={max_tokens} has no room for an answer behind "
                f"context={context} tokens of its prompt: raise the first or lower the "
                "second, which is at least 0."
            )
        self._max_texts = max_texts_per_prompt
        self._max_tokens = max_tokens
        self._context = context
        # Serial number to (prompt, text), the oldest first; serials of each prompt.
        self._texts: dict[int, tuple[int, np.ndarray]] = {}
        self._of_prompt: dict[int, collections.deque[int]] = {}
        self._next = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, prompt_id: int, prompt: np.ndarray, answer: np.ndarray) -> None:
        """Keep a finished answer, and drop what has no room any more.

        Of an answer that exceeds `max_tokens` the beginning is kept; an empty one
        teaches nothing and is not. Arrays are int32; a `prompt_id` always has the same
        prompt.
        """
        if len(answer) == 0:
            return
        context = prompt[max(len(prompt) - self._context, 0) :]
        text = np.concatenate([context, answer]).astype(np.int32)[: self._max_tokens]
        prompt_id = int(prompt_id)
        serials = self._of_prompt.get(prompt_id, ())
        if len(serials) == self._max_texts:
            self._drop(serials[0])
        while self.num_tokens + len(text) > self._max_tokens:
            self._drop(next(iter(self._texts)))
        self._texts[self._next] = (prompt_id, text)
        # Dropping the last text of a prompt forgets the prompt.
        self._of_prompt.setdefault(prompt_id, collections.deque()).append(self._next)
        self._next += 1
        self.num_tokens += len(text)

    def texts(self, prompt_id: int) -> list[np.ndarray]:
        """Return the texts kept of a prompt, the newest first."""
        serials = self._of_prompt.get(prompt_id, ())
        return [self._texts[serial][1] for serial in reversed(serials)]

    def corpus(
        self,
        prompt_ids: Sequence[int | None],
        live: Sequence[np.ndarray],
        *,
        num_texts: int,
        width: int,
        num_sources: int,
    ) -> tuple[ngram.Corpus, np.ndarray]:
        """Lay out the texts of a batch and say which of them each row may search.

        Room for finished answers is shared among the prompts in turn, newest first. A
        row searches its own text, then by turns a finished answer and a living sibling.

        Args:
          prompt_ids: B, of the rows; None: padding of the batch.
          live: B texts, prompt included and the pending token last.
          num_texts: C, at least B.
          width: S. Texts must have room for what a call draws; of longer finished
            answers the beginning is laid out.
          num_sources: M.

        Returns:
          The corpus (arrays of the host), and sources `[B, M] int32`.

        Raises:
          ValueError: more rows than texts, or a row longer than the width.
        """
        if len(prompt_ids) != len(live):
            raise ValueError(
                f"prompt_ids names {len(prompt_ids)} rows and live {len(live)}: give "
                "one text for each row, an empty one for padding."
            )
        if num_texts < len(live):
            raise ValueError(
                f"num_texts={num_texts} is less than the {len(live)} rows, each of "
                "which is a text: raise it."
            )
        longest = max((len(text) for text in live), default=0)
        if longest > width:
            raise ValueError(
                f"width={width} is less than the {longest} tokens of a row: raise it "
                "to the longest text of the run."
            )
        finished: dict[int, list[int]] = {p: [] for p in prompt_ids if p is not None}
        room = list(live)
        waiting = {prompt_id: self.texts(prompt_id) for prompt_id in finished}
        for turn in range(self._max_texts):
            for prompt_id, texts in waiting.items():
                if turn < len(texts) and len(room) < num_texts:
                    finished[prompt_id].append(len(room))
                    room.append(texts[turn])
        corpus = ngram.Corpus(
            texts=np.full((num_texts, width), -1, np.int32),
            lengths=np.zeros((num_texts,), np.int32),
        )
        for row, text in enumerate(room):
            corpus.texts[row, : len(text)] = text[:width]
            corpus.lengths[row] = min(len(text), width)
        sources = np.full((len(live), num_sources), -1, np.int32)
        for row, prompt_id in enumerate(prompt_ids):
            if prompt_id is None:
                continue
            alive = [i for i, p in enumerate(prompt_ids) if p == prompt_id and i != row]
            turns = itertools.zip_longest(finished[prompt_id], alive)
            mixed = [index for pair in turns for index in pair if index is not None]
            order = [row, *mixed][:num_sources]
            sources[row, : len(order)] = order
        return corpus, sources

    def _drop(self, serial: int) -> None:
        """Forget a text, the oldest of its prompt."""
        prompt_id, text = self._texts.pop(serial)
        self.num_tokens -= len(text)
        serials = self._of_prompt[prompt_id]
        serials.popleft()
        if not serials:
            del self._of_prompt[prompt_id]
