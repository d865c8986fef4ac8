"""The host's side of speculation: what proposers are given, and what became of it.

The drafter's cache uses the page table of the target's. What it holds may lag behind:
`missing` lists what the rows of a decode call lack, to be filled from the features that
the target's pages keep, so that turning speculation on, or new drafter weights, cost a
pass of the drafter and no forward of the target. Full pages of a prompt are filled once
for all rows that share them.
"""

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax import types
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import scheduler
from tlt_jax.runtime import external
from tlt_jax.specdec import calibration as calibration_lib
from tlt_jax.specdec import chain, sampling
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import learned, ngram, ngram_store
from tlt_jax.specdec.tuners import tuner as tuner_lib


@dataclasses.dataclass(frozen=True)
class TextsConfig:
    """Which texts are searched for suffix matches, in bounded memory.

    Attributes:
      longest: of a match in tokens; more are not compared.
      num_sources: texts that a row may search, its own included.
      num_finished: finished answers laid out beside the rows of a decode call.
      kept_per_prompt: finished answers kept of one prompt.
      kept_tokens: tokens of all of them.
      discount: factor on what was observed of matches, at each run of the engine.
    """

    longest: int = 8
    num_sources: int = 8
    num_finished: int = 32
    kept_per_prompt: int = 16
    kept_tokens: int = 1 << 22
    discount: float = 0.8

    def num_texts(self, batch: int) -> int:
        """Texts of a call: its rows, and finished answers."""
        return batch + self.num_finished


@dataclasses.dataclass(frozen=True)
class SpeculatorConfig:
    """How an engine speculates.

    Attributes:
      table: which strategies at how many rows; a tuner chooses among several.
      early: candidates for the time before there are a drafter's weights, which must
        do without it.
      drafter_cfg: the learned drafter; None: suffix matches alone.
      ranking: of its candidates, see `propose`.
      tau: temperature of the coupled score; None: the drafter's own, which with its
        sharpness follows what comes of its drafts, see `calibration`. A tau that is
        given stays, and so does the sharpness.
      texts: of suffix matches.
      rule: of acceptance. `keyed` is ours: the tokens are those of plain decoding.
        `rejection` and `block` keep their law alone: the tokens are others, for every
        drafter and batch others again. They judge chains sampled from the drafter, to
        which `ranking` and `tau` mean nothing; see `chain` and `rule_of`.
      capture: pages keep what training the drafter needs, see `capture`.
    """

    table: strategy_lib.Arms
    drafter_cfg: drafter.DrafterConfig | None = None
    ranking: str = "coupled"
    tau: float | None = None
    texts: TextsConfig = TextsConfig()
    rule: str = chain.KEYED
    capture: bool = False
    early: strategy_lib.Arms | None = None

    def rule_of(self, strategy: strategy_lib.Strategy) -> str:
        """Return the rule that judges a strategy's drafts.

        What is guessed without the drafter, before its time, was sampled from no law:
        there the rule is always keyed. That the two follow each other keeps the law, as
        nothing but the drafter's coming decides when; see `chain`.
        """
        return self.rule if strategy.drafts else chain.KEYED

    def check(
        self,
        target: model_config.ModelConfig,
        max_length: int,
        sampling_cfg: sampling.SamplingConfig,
    ) -> None:
        """Refuse what cannot be built for a target, texts up to a length, and a law.

        Raises:
          ValueError: a setting is out of range, the drafter is another target's, texts
            may grow longer than it was trained for, the rule cannot judge what the
            strategies draft, or a proposer cannot be imported.
        """
        if self.ranking not in learned.RANKINGS:
            raise ValueError(
                f"ranking={self.ranking!r}: use one of {', '.join(learned.RANKINGS)}."
            )
        if self.tau is not None and not 0 < self.tau:
            raise ValueError(
                f"tau={self.tau} is not positive: leave it out for the drafter's own."
            )
        chain.check(self.rule, self.table.strategies(), sampling_cfg)
        for strategy in self.early.strategies() if self.early else ():
            if strategy.drafts:
                raise ValueError(
                    f"strategy {strategy} is meant for the time before there is a "
                    f"drafter, but asks it: use {strategy}-ngram, or leave it out."
                )
        for strategy in self.table.strategies():
            if strategy.is_external:
                external.load("proposer", strategy.proposer)
        drafting = [s for s in self.table.strategies() if s.drafts]
        if self.capture and self.drafter_cfg is None:
            raise ValueError("capture=True keeps features for no drafter: name one.")
        if self.drafter_cfg is None:
            if drafting:
                raise ValueError(
                    f"strategy {drafting[0]} asks the learned drafter, but there is "
                    f"none: name one, or use {drafting[0]}-ngram with "
                    "tokens_to_verify that suffix matches can fill."
                )
            return
        here = drafter.identify(target)
        if self.drafter_cfg.target != here:
            raise ValueError(
                f"the drafter was made for the target {self.drafter_cfg.target}, but "
                f"this one is {here}: train one for it (tlt_jax.train_drafter), or "
                "name the model that it belongs to."
            )
        trained = self.drafter_cfg.max_length
        if trained and max_length > trained:
            raise ValueError(
                f"texts may grow to max_length={max_length} positions, but the drafter "
                f"was trained for {trained}: train one on longer texts (its recipe's "
                "max_length), or lower the prompt and completion limits; a training "
                "run uses it all the same with drafter.max_length."
            )
        num_tokens = self.drafter_cfg.num_draft_tokens
        size = self.drafter_cfg.block_size
        for strategy in drafting:
            if 0 < size < strategy.draft_depth:
                raise ValueError(
                    f"strategy {strategy} drafts {strategy.draft_depth} tokens deep, "
                    f"but this drafter guesses blocks of {size}: name strategies of at "
                    f"most D{size}, or train one with drafter.block_size="
                    f"{strategy.draft_depth}."
                )
            if strategy.topk > num_tokens:
                raise ValueError(
                    f"strategy {strategy} asks for {strategy.topk} children of a node, "
                    f"but the draft vocabulary has {num_tokens} tokens: lower topk."
                )


# What an engine has that was not told how to.
NEVER = SpeculatorConfig(strategy_lib.Arms(()))


class Speculator:
    """Chooses strategies and gives their proposers what they need of the host.

    Attributes:
      version: of the drafter in use; -1: none.
      weights: the drafter with embedding and head of the target; None: not both yet.
      score: tau and sharpness of the drafts to come, once some were coupled in the run.
    """

    def __init__(
        self,
        cfg: SpeculatorConfig,
        *,
        page_size: int,
        max_length: int,
        tuner: tuner_lib.Tuner | None = None,
        early_tuner: tuner_lib.Tuner | None = None,
        calibration: calibration_lib.Calibration | None = None,
    ):
        """Begin without weights; `offer` and `take_up` give some.

        `tuner` chooses among the strategies, None: the table does. `early_tuner`
        chooses while there are no drafter's weights, None: plain decoding is all then.
        `calibration` is no other engine's.
        """
        self.cfg = cfg
        self.rule = cfg.rule
        self.version = -1
        self.weights: learned.DrafterWeights | None = None
        self._tuner = tuner or tuner_lib.Static(cfg.table)
        self._early_tuner = early_tuner
        self._offer_lock = threading.Lock()
        self._offered: tuple[drafter.DrafterParams, int] | None = None
        self._params: drafter.DrafterParams | None = None
        self._calibration = calibration or calibration_lib.Calibration()
        self.score: tuple[float, float] | None = None
        self._page_size, self._max_length = page_size, max_length
        self._store = self._empty_store()
        self._outcomes = np.zeros((cfg.texts.longest + 1, 2), np.float32)
        # Full prompt pages that are in the drafter's cache.
        self._filled: set[int] = set()

    def _empty_store(self) -> ngram_store.NgramStore:
        texts = self.cfg.texts
        return ngram_store.NgramStore(texts.kept_per_prompt, texts.kept_tokens)

    def offer(self, params: drafter.DrafterParams, version: int) -> None:
        """Give new weights, on the engine's devices; safe from another thread."""
        with self._offer_lock:
            self._offered = params, version

    def take_up(
        self, rows: Sequence[scheduler.Row], target: model_params.Params | None
    ) -> None:
        """Use what was offered from now on; what `rows` have cached is stale.

        The drafter reads embedding and head of `target`.
        """
        with self._offer_lock:
            offer, self._offered = self._offered, None
        if offer is None:
            return
        params, self.version = offer
        sharpness, tau = drafter.measured(params)
        self._calibration.begin(self.version, tau, sharpness)
        # They are told anew in every call, and no weights that programs are made for.
        self._params = params.replace(sharpness=None, tau=None)
        self._filled.clear()
        for row in rows:
            row.drafted = 0
        if target is not None:
            self.set_target(target)

    def set_target(self, target: model_params.Params) -> None:
        """Take embedding and head of the target."""
        if self._params is not None:
            self.weights = learned.weights_of(self._params, target)
            if self.weights.follow is not None:
                # Where the drafter's own weights lie, however the head is split.
                where = self._params.block.markov_out.sharding
                follow = jax.device_put(self.weights.follow, where)
                self.weights = self.weights.replace(follow=follow)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Let what is decoded meanwhile teach nothing for later.

        Texts of other prompts, whose ids may be the same, and calls that are none of a
        rollout: an evaluation leaves no trace. Nothing is decoded when this begins or
        ends, by any engine that shares the tuners.
        """
        kept = self._store, self._outcomes, self.score
        parts = self._tuner, self._early_tuner, self._calibration
        learning = [part for part in parts if part is not None]
        states = copy.deepcopy([part.state() for part in learning])
        self._store = self._empty_store()
        try:
            yield
        finally:
            self._store, self._outcomes, self.score = kept
            for part, state in zip(learning, states, strict=True):
                part.restore(state)

    def begin(self) -> None:
        """Begin a run: nothing is cached, and what guesses did counts less."""
        self._filled.clear()
        self.score = None
        self._calibration.begin_run()
        self._outcomes = self._outcomes * np.float32(self.cfg.texts.discount)

    def choose(self, num_rows: int) -> strategy_lib.Strategy | None:
        """Choose how to decode `num_rows` rows; None: plainly."""
        strategy = self._chooser.choose(num_rows)
        if strategy is not None and strategy.drafts and self.weights is None:
            # Without a tuner for the time before, a drafter is waited for.
            return None
        return strategy

    def choices(self, num_rows: int) -> tuple[strategy_lib.Strategy | None, ...]:
        """All that `choose` may ever return for so many rows."""
        found = self._tuner.strategies(num_rows)
        if self._early_tuner is not None:
            found += self._early_tuner.strategies(num_rows)
        elif any(s is not None and s.drafts for s in found) and self.weights is None:
            found += (None,)
        return tuple(dict.fromkeys(found))

    @property
    def _chooser(self) -> tuner_lib.Tuner:
        early = self._early_tuner is not None and self.weights is None
        return self._early_tuner if early else self._tuner

    def written(self, jobs: Sequence[scheduler.Part]) -> None:
        """Note that pages hold other positions from now on."""
        for job in jobs:
            self._filled.difference_update(job.pages[job.start // self._page_size :])

    def missing(
        self,
        rows: Sequence[scheduler.Row],
        strategy: strategy_lib.Strategy | None,
    ) -> list[list[scheduler.Part]]:
        """List what to fill before `rows` speculate, and count it as done.

        Returns rounds of independent jobs: shared pages first, then each row's own.
        """
        if strategy is None or not strategy.drafts:
            return []
        shared: dict[int, scheduler.Part] = {}
        own, size = [], self._page_size
        # Beyond one for each row, what the first step can take in of all of them.
        spare = strategy.num_columns(len(rows)) - len(rows)
        for row in rows:
            behind = row.length - row.drafted - 1
            if 0 <= behind < strategy.max_accept_length and behind <= spare:
                spare -= behind
                continue
            text, pages = row.text(), tuple(row.pages)
            num_full = (len(row.request.prompt) - 1) // size
            lacking = [page not in self._filled for page in pages[:num_full]]
            if any(lacking):
                first = lacking.index(True)
                job = scheduler.Part(text, first * size, num_full * size, pages)
                shared.setdefault(pages[first], job)
            start = max(num_full * size, row.drafted) // size * size
            stop = max(row.length - 1, 0)
            if start < stop:
                own.append(scheduler.Part(text, start, stop, pages))
            row.drafted = stop
        for job in shared.values():
            self._filled.update(job.pages[: job.stop // size])
        return [jobs for jobs in (list(shared.values()), own) if jobs]

    def inputs(
        self,
        rows: Sequence[scheduler.Row],
        batch: int,
        strategy: strategy_lib.Strategy | None,
    ) -> Any:
        """Give what the strategy's proposer needs, padded to the batch bucket.

        What was `missing` of the rows is filled by now.

        Returns:
          A `learned.Draft`, an `ngram.Matching`, a pair of them, or nothing.
        """
        draft = matching = None
        if strategy is not None and strategy.drafts:
            draft = self._draft(rows, batch, strategy)
        if strategy is not None and strategy.matches:
            matching = self._matching(rows, batch)
        return paired(draft, matching)

    def _draft(self, rows, batch, strategy) -> learned.Draft:
        """Say how far the drafter is with each row."""
        lengths = np.zeros((batch,), np.int32)
        tokens = np.zeros((batch, strategy.max_accept_length), np.int32)
        for i, row in enumerate(rows):
            rest = row.tail(row.length - row.drafted)
            lengths[i] = row.drafted
            tokens[i, : len(rest)] = rest
        return learned.Draft(
            self.weights, self._tau, self._calibration.sharpness, lengths, tokens
        )

    @property
    def _tau(self) -> np.float32:
        own = self._calibration.tau
        return own if self.cfg.tau is None else np.float32(self.cfg.tau)

    def _matching(self, rows, batch) -> ngram.Matching:
        """Lay out the texts that the rows may search."""
        spare = batch - len(rows)
        corpus, sources = self._store.corpus(
            [row.request.prompt_id for row in rows] + [None] * spare,
            [row.text() for row in rows] + [np.zeros((0,), np.int32)] * spare,
            num_texts=self.cfg.texts.num_texts(batch),
            width=self._max_length,
            num_sources=self.cfg.texts.num_sources,
        )
        return ngram.Matching(corpus, sources, self._outcomes)

    def took(
        self,
        rows: Sequence[scheduler.Row],
        call: tuner_lib.Call,
        progress: Any,
    ) -> None:
        """Note what came of a decode call, and tell whoever chose its strategy.

        `progress` is what its proposer tells: how far the drafter came and how true its
        drafts, how the matches did, or both.
        """
        self._chooser.record(call)
        strategy = call.strategy
        if strategy is None:
            return
        is_pair = strategy.drafts and strategy.matches
        drafted, outcomes = progress if is_pair else (progress, progress)
        if strategy.drafts:
            lengths, evidence = drafted
            if evidence is not None:
                if self.cfg.tau is None:
                    self._calibration.record(evidence)
                self.score = float(self._tau), float(self._calibration.sharpness)
            for row, length in zip(rows, lengths, strict=False):
                row.drafted = int(length)
        if strategy.matches:
            self._outcomes = np.asarray(outcomes)

    def finished(self, request: types.Request, tokens: np.ndarray) -> None:
        """Keep a finished answer for later matches."""
        self._store.add(request.prompt_id, request.prompt, tokens)


def paired(draft: Any, matching: Any) -> Any:
    """Give a proposer the one that it asks, both as a pair, or nothing."""
    if draft is not None and matching is not None:
        return draft, matching
    return draft or matching or ()
