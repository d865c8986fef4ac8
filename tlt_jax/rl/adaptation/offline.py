"""A drafter's training on texts that are all there, before any run.

The same learner as beside a rollout (`spot_trainer`), with nobody who wants the devices
back. Every epoch takes each text once, in an order of its own: batches are a function
of the seed and the texts alone, so that a killed training goes on from a step's number.
So are those of a round, behind which others of the texts are new.
(The line of batches beside rollouts, `texts.sampling`, mixes the texts of two steps as
they come in; here nothing comes in, and its state would have to be kept.)
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax.models import params as model_params
from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.rl.adaptation import offline_texts
from tlt_jax.runtime import train_state
from tlt_jax.specdec.texts import layout, shards, vocabulary
from tlt_jax.specdec.training import unroll
from tlt_jax.types import Array

_MAX_SKIPPED = 10


class OfflineTraining:
    """Takes steps on the training texts and measures on those held out.

    Attributes:
      learner: the drafter.
      num_steps: taken, skipped ones too.
      skips: steps in a row that were not finite.
    """

    def __init__(
        self,
        learner: drafter_learner.DrafterLearner,
        texts: shards.Shards,
        *,
        num_rows: int,
        seed: int,
        eos_ids: Sequence[int],
        rounds: offline_texts.Rounds | None = None,
        prepare: Callable[[int], None] = lambda number: None,
        **sizes: int,
    ):
        """Take the parts; `begin` gives weights and chooses the draft vocabulary.

        The texts are `offline_texts.write`'s; the rows of a step are B, `num_rows`, and
        of T and M, `row_tokens` and `row_bases`. The seed is of weights and of the
        order of texts; `eos_ids` are always among the tokens that can be proposed.
        `prepare` is called with the number of a round before its first step and sees to
        it that its texts are there; by itself there is one round, of all texts.

        Raises:
          ValueError: no text has a position to learn from.
        """
        self.learner, self.num_steps = learner, 0
        self.skips = train_state.Skips(_MAX_SKIPPED)
        # No drafter was measured before, whose sharpness would be kept.
        learner.sharpness = None
        self._texts, self._seed = texts, seed
        self._sizes, self._num_rows = sizes, num_rows
        self._rounds = rounds or offline_texts.Rounds(offline_texts.HELD_OUT)
        self._prepare = prepare
        self._find(range(offline_texts.HELD_OUT))
        if not self._plan(self._train, (seed, 0)):
            raise ValueError(
                "no text has a position to draft from: raise texts.max_new_tokens or "
                "batch.row_tokens."
            )
        self._eos_ids = eos_ids

    def begin(
        self, devices: drafter_learner.Devices, target: model_params.Params
    ) -> None:
        """Go to devices, with random weights unless `restore` gave some.

        See `DrafterLearner.begin`.
        """
        if self.learner.state is None:
            norm = jax.device_get(target.final_norm)
            self.learner.state = self.learner.init_state(None, norm, self._seed)
        if not self.learner.has_vocabulary:
            weights = vocabulary.expected(self._training_texts(), target.head)
            self.learner.choose_vocabulary(weights, self._eos_ids)
        self.learner.begin(devices, target)

    def steps(self, until: int) -> Iterator[dict[str, Array]]:
        """Take steps up to the number `until`; yield their metrics, on their way.

        Raises:
          failures.NotFiniteError: steps are not finite any more.
        """
        before = None
        missing = until - self.num_steps
        for batch in itertools.islice(self._batches(self.num_steps), missing):
            outcome = drafter_learner.run_through(self.learner.step(batch))
            self.num_steps += 1
            if before is not None:
                # Of the step before: fetching this one's would wait for the device.
                self.skips.count(int(before["skipped"]))
                self.skips.check(
                    "lower optimizer.learning_rate and begin again in another "
                    "--workdir; the directory texts/ can be moved there."
                )
            before = outcome
            yield outcome

    def measure(self) -> dict[str, Any]:
        """Say what drafts along the held-out texts would have had accepted.

        Returns:
          See `acceptance.summarise`. So many texts tell sharpnesses apart, so that the
          best is taken whichever was the best before.
        """
        self.learner.sharpness = None
        rows = self._plan(self._held_out, None)
        measuring = self.learner.measure(map(self._lay_out, rows))
        return drafter_learner.run_through(measuring)

    def state(self) -> train_state.Snapshot:
        """Return what a killed training goes on from, besides its number of steps."""
        meta: dict[str, Any] = {"num_skipped": self.skips.in_a_row}
        if self.learner.draft_ids is not None:
            # The texts that they were chosen by may be deleted.
            meta["draft_ids"] = self.learner.draft_ids.tolist()
        return train_state.Snapshot(self.learner.newest, meta=meta)

    def restore(self, snapshot: train_state.Snapshot, num_steps: int) -> None:
        """Go on from a `state` that was taken after so many steps; before `begin`."""
        self.learner.state = jax.device_get(snapshot.state)
        self.skips.in_a_row = snapshot.meta["num_skipped"]
        if "draft_ids" in snapshot.meta:
            self.learner.draft_ids = np.array(snapshot.meta["draft_ids"], np.int32)
        elif not self.learner.has_vocabulary:
            # Of an older checkpoint, which has the tokens that were drawn most.
            size = self.learner.cfg.layer.vocab_size
            counts = vocabulary.drawn(self._training_texts(), size)
            self.learner.choose_vocabulary(counts, self._eos_ids)
        self.num_steps = num_steps

    def about_texts(self) -> dict[str, Any]:
        """Count the training texts, and how much a draft vocabulary leaves out."""
        lengths = self._texts.lengths - self._texts.response_starts
        row = {
            "texts/num": len(self._train),
            "texts/response_tokens": int(lengths[self._train].sum()),
        }
        if self.learner.draft_ids is not None:
            held_out = [self._texts.read(i) for i in self._held_out]
            tokens = np.concatenate([r.tokens[r.response_start :] for r in held_out])
            known = np.isin(tokens, self.learner.draft_ids)
            row["texts/draft_vocab_coverage"] = float(known.mean())
        return row

    def _find(self, text_ids: range) -> None:
        """Find the texts of these ids, and those held out, among all."""
        ids = np.array(self._texts.text_ids)
        chosen = (ids >= text_ids.start) & (ids < text_ids.stop)
        self._train = np.flatnonzero(chosen)
        self._held_out = np.flatnonzero(ids >= offline_texts.HELD_OUT)

    def _training_texts(self) -> list[layout.Record]:
        return [self._texts.read(i) for i in self._train]

    def _plan(self, indices: np.ndarray, seed: tuple[int, ...] | None):
        return layout.plan(
            self._texts, indices, num_rows=self._num_rows, seed=seed, **self._sizes
        )

    def _lay_out(self, rows: Sequence[Sequence[layout.Span]]) -> unroll.Batch:
        return layout.lay_out(self._texts, rows, **self._sizes)

    def _batches(self, first: int) -> Iterator[unroll.Batch]:
        """Batches from the `first` on."""
        begun, done = self._rounds.place(first)
        for number in itertools.count(begun):
            self._prepare(number)
            self._find(self._rounds.text_ids(number))
            end = self._rounds.num_steps - done if self._rounds.num_steps else None
            yield from itertools.islice(self._epochs(number, done), end)
            done = 0

    def _epochs(self, number: int, first: int) -> Iterator[unroll.Batch]:
        """Batches of a round from its `first` on."""
        for epoch in itertools.count():
            seed = (self._seed, epoch, number) if number else (self._seed, epoch)
            plan = self._plan(self._train, seed)
            yield from map(self._lay_out, plan[first:])
            first = max(first - len(plan), 0)
