"""Drafters that learn from the texts of RL runs which they have no part in.

By the keyed rule neither the policy nor its texts hang on a drafter, so that a run is
made once, with the features of its texts, and any drafter is trained and measured on
them afterwards, at any step, as it would have been beside it.
"""

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import optax

from experiments.lab import recipes, tables
from tlt_jax import assembly, speculation
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.runtime import compile_cache, train_state
from tlt_jax.settings import speculation as speculation_settings
from tlt_jax.specdec.texts import layout, vocabulary
from tlt_jax.specdec.training import objectives, rules, unroll

# Policies that hardly move, and that move far.
DRIFTS = "small", "large"
# Architecture, objective, and the loss that laws are compared by; None: as published.
DRAFTERS = {
    "EAGLE-3": ("tlt", "eagle3", "lk_hybrid"),
    "HASS": ("tlt", "hass", None),
    "block": ("block", "eagle3", "lk_hybrid"),
}
SHARPNESS_BATCHES, AVERAGE = 4, 0.95


@dataclasses.dataclass(frozen=True)
class Study:
    """A recipe whose policy writes texts, and what learns of them.

    Attributes:
      rates: of the policy's learning, by drift.
      shape: of all drafters, architecture apart.
      rows: of an update's batch, see `layout.lay_out`.
      measured_rows: rows measured at once.
      head_chunk: bases whose logits are held at once; 0: all of a batch.
      learning_rate: of the drafters, after so many updates of `warm_up`.
      overrides: of the recipe. Its own drafter, which keeps the features of texts and
        does nothing else, shall have small programs.
      depth: of the chains.
    """

    rates: Mapping[str, float]
    shape: Mapping[str, object]
    rows: Mapping[str, int]
    measured_rows: int
    head_chunk: int
    learning_rate: float
    warm_up: int
    overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)
    depth: int = 7


# The rate of the recipe is 5e-4.
TINY = Study(
    rates={"small": 1e-4, "large": 2e-3},
    shape={"features": "layers", "feature_layers": (0, 1)},
    rows={"num_rows": 2, "row_tokens": 128, "row_bases": 112},
    measured_rows=8,
    head_chunk=0,
    learning_rate=2e-3,
    warm_up=10,
)
# The rate of the recipe is 5e-6.
SMOLLM2 = Study(
    rates={"small": 5e-6, "large": 1e-4},
    shape={"features": "low_mid_high", "draft_vocab_size": 8192},
    rows={"num_rows": 2, "row_tokens": 576, "row_bases": 384},
    measured_rows=2,
    head_chunk=256,
    learning_rate=1e-3,
    warm_up=10,
    overrides={
        "workers.num": 1,
        "mesh.data": 1,
        "rollout.max_batch": 32,
        "eval.every": 0,
        "drafter.draft_vocab_size": 64,
    },
)
STUDIES = {"configs/tiny.py:count": TINY, "configs/smollm2_tlt.py:products": SMOLLM2}
_CAPTURING = {
    **recipes.DRAFTER,
    "adaptation.max_frac": 0.0,
    "adaptation.name": "eagle",
    "adaptation.num_steps": 1,
    "adaptation.row_tokens": 32,
    "adaptation.row_bases": 16,
}


def study_of(config: str) -> Study:
    """Returns the study of a recipe.

    Raises:
      ValueError: there is none.
    """
    if config not in STUDIES:
        raise ValueError(
            f"--config={config}: the sizes of drafters are known for "
            f"{' and '.join(STUDIES)}."
        )
    return STUDIES[config]


class Texts(list):
    """Records as `layout` reads them."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.array([len(record.tokens) for record in self], np.int64)

    @property
    def response_starts(self) -> np.ndarray:
        """Where each one's response starts."""
        return np.array([record.response_start for record in self], np.int64)

    def read(self, index: int) -> layout.Record:
        """Returns the record at an index."""
        return self[index]

    def batches(
        self, rows: Mapping[str, int], seed: tuple[int, ...] | None = None
    ) -> Iterator[unroll.Batch]:
        """Lays each text out once, in an order of the seed; None: as they stand."""
        sizes = {name: rows[name] for name in ("row_tokens", "row_bases")}
        for batch in layout.plan(self, range(len(self)), **rows, seed=seed):
            yield layout.lay_out(self, batch, **sizes)


@dataclasses.dataclass(frozen=True)
class Step:
    """An RL step: the policy that wrote its texts, and what became of it.

    Of the policy, what drafters read: embedding, head and norm, no layers.
    """

    policy: model_params.Params
    texts: Texts
    row: tables.Row


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: texts of the policy that RL begins with, and the steps.

    `eos_ids` can always be proposed.
    """

    model: model_config.ModelConfig
    eos_ids: Sequence[int]
    before: Texts
    steps: Sequence[Step]


class Runs:
    """What cells share: the newest RL runs, and drafters with their programs."""

    def __init__(self, options: argparse.Namespace):
        self._options, self._study = options, study_of(options.config)
        compile_cache.enable()
        self.of = functools.lru_cache(len(DRIFTS))(self._make)
        self.student = functools.cache(functools.partial(Student, self._study))

    def _make(self, drift: str, seed: int) -> Run:
        options, study = self._options, self._study
        overrides = {**_CAPTURING, "num_steps": options.steps, "seed": seed}
        overrides |= {f"drafter.{key}": value for key, value in study.shape.items()}
        overrides |= study.overrides
        overrides["optimizer.learning_rate"] = study.rates[drift]
        settings = recipes.settings_of(options.config, overrides)
        found: list[layout.Record] = []

        def taken() -> Texts:
            texts = Texts(sorted(found, key=lambda record: record.text_id))
            found.clear()
            return texts

        with recipes.begun(settings) as trainer:
            parts, steps = trainer.parts, []
            parts.workers.on_text = found.append
            for number in range(options.rollouts):
                # Of no step of the run: requests have numbers of their own.
                trainer.rollouts.take(options.steps + number, trainer.watch())
                parts.workers.release_caches()
            before, first = taken(), recipes.weights(trainer)
            for _ in range(options.steps):
                (placed,) = trainer.rollouts.newest.placed
                policy = jax.device_get(placed.replace(layers=()))
                moved = np.linalg.norm(recipes.weights(trainer) - first)
                row = trainer.take_step()
                row["policy_distance"] = float(moved / np.linalg.norm(first))
                steps.append(Step(policy, taken(), row))
            eos_ids = assembly.eos_ids_of(parts.model, parts.tokenizer)
        return Run(parts.model, eos_ids, before, steps)


class Student:
    """A drafter of one kind; it learns from any run's texts, and is measured on them.

    Its state is the learner's; `kept` and `go_on` keep one and take it up. `cost` is
    of an update, see `operations`.
    """

    def __init__(self, study: Study, name: str, model: model_config.ModelConfig):
        self.study, depth, rows = study, study.depth, study.rows
        architecture, objective, loss = DRAFTERS[name]
        named = objective, {"token_loss": loss} if loss else {}
        shape = speculation_settings.DrafterShape(architecture, **study.shape)
        chosen = objectives.choose(*named)
        length = rows["row_tokens"]
        self.cfg = speculation.drafter_of(shape, chosen, model, length, depth)
        self.objective = objectives.choose(*named, self.cfg.block_size)
        num_bases = study.measured_rows * (rows["row_bases"] + depth - 1)
        chunk, rate = study.head_chunk or num_bases, study.learning_rate
        rates = optax.linear_schedule(rate / study.warm_up, rate, study.warm_up)
        adam = optax.adamw(rates, 0.9, 0.95, weight_decay=0.0)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
        d_model, features = model.d_model, self.cfg.num_features
        self.cost = operations(self.cfg, self.objective, rows)
        self._learner = drafter_learner.DrafterLearner(
            self.cfg,
            self.objective,
            train_state.averaged(optimizer, AVERAGE),
            batch=layout.described(
                **rows, d_model=d_model, num_features=features, dtype="float32"
            ),
            head_chunk=chunk,
            piece_bases=0,
            depth=depth,
            dtype="float32",
        )
        forward = unroll.ForwardConfig(self.cfg, head_chunk=chunk)
        given = functools.partial(rules.measure, num_steps=depth, cfg=forward)
        self._measure = jax.jit(given)

    @property
    def num_updates(self) -> int:
        """Updates taken."""
        return self._learner.num_updates

    def begin(self, run: Run, seed: int) -> None:
        """Begins with random weights, and tokens that the texts before RL call for."""
        learner, policy = self._learner, run.steps[0].policy
        learner.sharpness = None
        learner.state = learner.init_state(None, policy.final_norm, seed)
        if self.cfg.draft_vocab_size:
            weights = vocabulary.expected(run.before, policy.head)
            learner.choose_vocabulary(weights, run.eos_ids)

    def kept(self) -> tuple:
        """Returns its state."""
        return self._learner.state, self._learner.sharpness

    def go_on(self, kept: tuple) -> None:
        """Goes on from a state."""
        self._learner.state, self._learner.sharpness = kept

    def learn(
        self, policy: model_params.Params, texts: Texts, num: int, seed: int
    ) -> None:
        """Takes `num` updates, each text once an epoch; finds the best sharpness."""
        if not num:
            return
        learner, begun = self._learner, self.num_updates
        learner.begin(tuple(jax.devices()[:1]), policy)
        rows = self.study.rows
        epochs = (
            texts.batches(rows, (seed, begun, epoch)) for epoch in itertools.count()
        )
        batches = itertools.chain.from_iterable(epochs)
        for batch in itertools.islice(batches, num):
            drafter_learner.run_through(learner.step(batch))
        some = itertools.islice(texts.batches(rows, (seed, begun)), SHARPNESS_BATCHES)
        drafter_learner.run_through(learner.measure(some))
        learner.end()

    def accepted(self, policy: model_params.Params, texts: Texts) -> dict[str, float]:
        """Measures accept lengths by rule, and the overlap of first guesses."""
        weights = self._learner.weights("float32")
        ids = weights.draft_ids
        head = drafter_head.head_rows(policy, ids)
        given = jax.device_put((unroll.Target(policy.embed, head, ids), policy.head))
        rows = {**self.study.rows, "num_rows": self.study.measured_rows}
        parts = [self._measure(weights, batch, *given) for batch in texts.batches(rows)]
        sums = jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(parts))
        found = {rule: float(x) for rule, x in rules.accept_lengths(sums).items()}
        return found | {"overlap": float(sums["overlap"][0] / sums["count"][0])}


def operations(
    cfg: drafter.DrafterConfig,
    objective: objectives.Objective,
    rows: Mapping[str, int],
) -> int:
    """Counts multiplications and additions of an update's products, and of norms.

    `rows` are of a batch. A backward pass takes two products for each of the forward
    one's; of heads, which do not learn, one, and of the target's laws none.
    """
    steps = objective.num_steps
    layer, described = cfg.layer, drafter.describe(cfg)
    columns, bases = (rows["num_rows"] * rows[x] for x in ("row_tokens", "row_bases"))

    def weights(part) -> int:
        sizes = (math.prod(weight.shape) for weight in jax.tree.leaves(part))
        return 2 * sum(sizes)

    kv = 2 * 2 * layer.num_kv_heads * layer.head_dim * layer.d_model
    context = weights((described.fuse, described.join)) + kv
    attention = 4 * layer.num_heads * layer.head_dim * rows["row_tokens"]
    guess = weights((described.join, described.layer)) + attention
    if described.block is not None:
        guess += weights((described.block.markov_in, described.block.markov_out))
    head = 2 * layer.d_model * cfg.num_draft_tokens
    learned = columns * context + steps * bases * guess
    return 3 * learned + (2 * steps + 1) * bases * head
