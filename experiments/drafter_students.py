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
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import optax

from experiments.lab import recipes, tables
from tlt_jax import speculation
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.runtime import compile_cache, train_state
from tlt_jax.settings import speculation as speculation_settings
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.training import objectives, rules, unroll

# The policy's learning rates; the recipe's is 5e-4.
DRIFTS = {"small": 1e-4, "large": 2e-3}
# Architecture, objective, and the loss that laws are compared by; None: as published.
DRAFTERS = {
    "EAGLE-3": ("tlt", "eagle3", "lk_hybrid"),
    "HASS": ("tlt", "hass", None),
    "block": ("block", "eagle3", "lk_hybrid"),
}
DEPTH = 7
LAYERS = (0, 1)
ROWS = {"num_rows": 2, "row_tokens": 128, "row_bases": 112}
# Rows measured at once, and batches by which the sharpness is chosen.
MEASURED_ROWS, SHARPNESS_BATCHES = 8, 4
LEARNING_RATE, AVERAGE, WARM_UP = 2e-3, 0.95, 10
# Of the run that makes the texts: no drafter is used, and its programs shall be small.
CAPTURING = {
    **recipes.DRAFTER,
    "drafter.features": "layers",
    "drafter.feature_layers": LAYERS,
    "adaptation.max_frac": 0.0,
    "adaptation.name": "eagle",
    "adaptation.num_steps": 1,
    "adaptation.row_tokens": 32,
    "adaptation.row_bases": 16,
}


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
        self, seed: tuple[int, ...] | None = None, num_rows: int = ROWS["num_rows"]
    ) -> Iterator[unroll.Batch]:
        """Lays each text out once, in an order of the seed; None: as they stand."""
        sizes = {name: ROWS[name] for name in ("row_tokens", "row_bases")}
        given = {"num_rows": num_rows, "seed": seed, **sizes}
        for rows in layout.plan(self, range(len(self)), **given):
            yield layout.lay_out(self, rows, **sizes)


@dataclasses.dataclass(frozen=True)
class Step:
    """An RL step: the policy that wrote its texts, and what became of it."""

    policy: model_params.Params
    texts: Texts
    row: tables.Row


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: texts of the policy that RL begins with, and the steps."""

    model: model_config.ModelConfig
    before: Texts
    steps: Sequence[Step]


class Runs:
    """What cells share: the newest RL runs, and drafters with their programs."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        compile_cache.enable()
        self.of = functools.lru_cache(len(DRIFTS))(self._make)
        self.student = functools.cache(Student)

    def _make(self, drift: str, seed: int) -> Run:
        options = self._options
        overrides = {**CAPTURING, "num_steps": options.steps, "seed": seed}
        overrides["optimizer.learning_rate"] = DRIFTS[drift]
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
                policy = jax.device_get(placed)
                moved = np.linalg.norm(recipes.weights(trainer) - first)
                row = trainer.take_step()
                row["policy_distance"] = float(moved / np.linalg.norm(first))
                steps.append(Step(policy, taken(), row))
        return Run(parts.model, before, steps)


class Student:
    """A drafter of one kind; it learns from any run's texts, and is measured on them.

    Its state is the learner's; `kept` and `go_on` keep one and take it up.
    """

    def __init__(self, name: str, model: model_config.ModelConfig):
        architecture, objective, loss = DRAFTERS[name]
        named = objective, {"token_loss": loss} if loss else {}
        shape = speculation_settings.DrafterShape(architecture, "layers", LAYERS)
        chosen = objectives.choose(*named)
        length = ROWS["row_tokens"]
        self.cfg = speculation.drafter_of(shape, chosen, model, length, DEPTH)
        self.objective = objectives.choose(*named, self.cfg.block_size)
        # All logits at once.
        num_bases = MEASURED_ROWS * (ROWS["row_bases"] + DEPTH - 1)
        rates = optax.linear_schedule(LEARNING_RATE / WARM_UP, LEARNING_RATE, WARM_UP)
        adam = optax.adamw(rates, 0.9, 0.95, weight_decay=0.0)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
        d_model, features = model.d_model, len(LAYERS)
        self._learner = drafter_learner.DrafterLearner(
            self.cfg,
            self.objective,
            train_state.averaged(optimizer, AVERAGE),
            batch=layout.described(
                **ROWS, d_model=d_model, num_features=features, dtype="float32"
            ),
            head_chunk=num_bases,
            piece_bases=0,
            depth=DEPTH,
            dtype="float32",
        )
        forward = unroll.ForwardConfig(self.cfg, head_chunk=num_bases)
        given = functools.partial(rules.measure, num_steps=DEPTH, cfg=forward)
        self._measure = jax.jit(given)

    @property
    def num_updates(self) -> int:
        """Updates taken."""
        return self._learner.num_updates

    def begin(self, policy: model_params.Params, seed: int) -> None:
        """Begins with random weights."""
        self._learner.sharpness = None
        self._learner.state = self._learner.init_state(None, policy.final_norm, seed)

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
        epochs = (texts.batches((seed, begun, epoch)) for epoch in itertools.count())
        batches = itertools.chain.from_iterable(epochs)
        for batch in itertools.islice(batches, num):
            drafter_learner.run_through(learner.step(batch))
        some = itertools.islice(texts.batches((seed, begun)), SHARPNESS_BATCHES)
        drafter_learner.run_through(learner.measure(some))
        learner.end()

    def accepted(self, policy: model_params.Params, texts: Texts) -> dict[str, float]:
        """Measures accept lengths by rule, and the overlap of first guesses."""
        weights = self._learner.weights("float32")
        target = unroll.Target(policy.embed, policy.head)
        parts = [
            self._measure(weights, batch, target, policy.head)
            for batch in texts.batches(num_rows=MEASURED_ROWS)
        ]
        sums = jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(parts))
        found = {rule: float(x) for rule, x in rules.accept_lengths(sums).items()}
        return found | {"overlap": float(sums["overlap"][0] / sums["count"][0])}


def operations(student: Student) -> int:
    """Counts multiplications and additions of an update's products, and of norms.

    A backward pass takes two products for each of the forward one's; of heads, which do
    not learn, one, and of the target's laws none.
    """
    cfg, steps = student.cfg, student.objective.num_steps
    layer, described = cfg.layer, drafter.describe(cfg)
    columns = ROWS["num_rows"] * ROWS["row_tokens"]
    bases = ROWS["num_rows"] * ROWS["row_bases"]

    def weights(part) -> int:
        sizes = (math.prod(weight.shape) for weight in jax.tree.leaves(part))
        return 2 * sum(sizes)

    kv = 2 * 2 * layer.num_kv_heads * layer.head_dim * layer.d_model
    context = weights((described.fuse, described.join)) + kv
    attention = 4 * layer.num_heads * layer.head_dim * ROWS["row_tokens"]
    guess = weights((described.join, described.layer)) + attention
    if described.block is not None:
        guess += weights((described.block.markov_in, described.block.markov_out))
    head = 2 * layer.d_model * layer.vocab_size
    learned = columns * context + steps * bases * guess
    return 3 * learned + (2 * steps + 1) * bases * head
