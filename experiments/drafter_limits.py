r"""What limits a drafter's first guess: reading, amount of text, width, vocabulary.

    python -m experiments.drafter_limits --scale=cpu \
        --texts=workdirs/general_drafter/texts

Nothing is trained step by step: the target's last feature is regressed on what a
drafter reads one position before (embedding of the token behind it, features of the
target), in closed form, and goes through the target's head. Overlap is 1 - total
variation between that law and the target's own: the share of sampled drafts that are
accepted, at the first position. `width` is of a hidden layer of random weights beside
the linear one. Texts are those that the drafter of `configs/smollm2_drafter.py:general`
learns from (its training has ended, or copy them).

With few texts a regression knows its own too well and others not well enough: with ever
more of them both overlaps meet, between what they are here. So the one on its own texts
bounds what a regression of this kind could reach. It bounds no drafter that attends, or
learns overlap itself; the mass of the tokens that can be proposed bounds any.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import claims, experiment, plotting, tables
from tlt_jax import policy as policy_lib
from tlt_jax.rl.adaptation import offline_texts
from tlt_jax.specdec.texts import layout, shards
from tlt_jax.specdec.texts import vocabulary as vocabulary_lib

TOKEN, LAST, LAYERS, EARLIER = "token", "last", "layers", "earlier"
# What is read, share of the training texts, width, and tokens that can be proposed.
CASES = {
    "token alone": ((TOKEN,), 1.0, 0, 0),
    "last feature": ((TOKEN, LAST), 1.0, 0, 0),
    "three layers": ((TOKEN, LAYERS), 1.0, 0, 0),
    "three layers and the last": ((TOKEN, LAYERS, LAST), 1.0, 0, 0),
    "and the position before": ((TOKEN, LAYERS, EARLIER), 1.0, 0, 0),
    "1/16 of the texts": ((TOKEN, LAYERS), 1 / 16, 0, 0),
    "1/4 of the texts": ((TOKEN, LAYERS), 1 / 4, 0, 0),
    "width 576": ((TOKEN, LAYERS), 1.0, 576, 0),
    "width 1536": ((TOKEN, LAYERS), 1.0, 1536, 0),
    "8192 tokens": ((TOKEN, LAYERS), 1.0, 0, 8192),
    "2048 tokens": ((TOKEN, LAYERS), 1.0, 0, 2048),
}
BASE = "three layers"
# Every tenth text chooses the penalty and how sharp laws are.
_CHOOSING = 10
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
_SHARPNESSES = (1.0, 1.15, 1.3, 1.5, 2.0)
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class World:
    """The target's embedding and head `[V, D]`, and texts by their use."""

    embed: np.ndarray
    head: np.ndarray
    eos_ids: tuple[int, ...]
    train: list[layout.Record]
    choosing: list[layout.Record]
    held_out: list[layout.Record]


def load(options: argparse.Namespace) -> World:
    """Loads the target and the texts."""
    folder = pathlib.Path(options.texts)
    found = shards.Shards(folder)
    every = [found.read(i) for i in range(len(found))]
    own = [r for r in every if r.text_id < offline_texts.HELD_OUT]
    held_out = [r for r in every if r.text_id >= offline_texts.HELD_OUT]
    if not own or not held_out:
        raise ValueError(f"--texts={folder} has no texts, or none held out.")
    target = policy_lib.load(options.model, "float32")
    return World(
        np.asarray(target.params.embed),
        np.asarray(target.params.head),
        target.eos_ids,
        [record for i, record in enumerate(own) if i % _CHOOSING],
        own[::_CHOOSING],
        held_out,
    )


def check(options: argparse.Namespace) -> None:
    """Refuses a folder that holds no texts."""
    if not (pathlib.Path(options.texts) / "about.json").is_file():
        raise ValueError(
            f"--texts={options.texts} holds no texts of a drafter's training: name the "
            "folder texts/ of its workdir."
        )


def examples(
    world: World, records: list[layout.Record], reads: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Lays out what is read at each base, and the target's last feature one further.

    Returns `[n, inputs]` and `[n, D]`, float32; parts of inputs have a root mean square
    of one, as a drafter makes them.
    """
    inputs, wanted = [], []
    for record in records:
        start = max(record.response_start - 2, 1)
        base = np.arange(start, len(record.tokens) - 2)
        hidden = np.asarray(record.hidden, np.float32)
        features = np.asarray(record.features, np.float32)
        parts = []
        if TOKEN in reads:
            parts.append(world.embed[record.tokens[base + 1]])
        if LAST in reads:
            parts.append(hidden[base])
        if LAYERS in reads:
            parts += np.split(features[base], features.shape[1] // hidden.shape[1], 1)
        if EARLIER in reads:
            parts += [hidden[base - 1], world.embed[record.tokens[base]]]
        inputs.append(np.concatenate([_unit(part) for part in parts], axis=1))
        wanted.append(hidden[base + 1])
    return np.concatenate(inputs), np.concatenate(wanted)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + 1e-6)


def widened(inputs: np.ndarray, width: int) -> np.ndarray:
    """Adds a one, and a hidden layer of random weights."""
    ones = np.ones((len(inputs), 1), np.float32)
    if not width:
        return np.concatenate([inputs, ones], axis=1)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((inputs.shape[1], width), np.float32)
    hidden = np.maximum(inputs @ weights / np.sqrt(inputs.shape[1]), 0.0)
    return np.concatenate([inputs, hidden, ones], axis=1)


def regress(
    inputs: np.ndarray, wanted: np.ndarray, choosing: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Solves for weights `[inputs, D]`, with the penalty that suits others best."""
    gram = inputs.T @ inputs / len(inputs)
    cross = inputs.T @ wanted / len(inputs)
    best, weights = np.inf, None
    for penalty in _PENALTIES:
        shifted = gram + penalty * np.eye(len(gram), dtype=np.float32)
        found = np.linalg.solve(shifted, cross).astype(np.float32)
        error = float(np.mean(np.square(choosing[0] @ found - choosing[1])))
        if error < best:
            best, weights = error, found
    return weights


@jax.jit
def _compare(head, known, hidden, guessed, sharpness):
    """Overlap, agreement of the likeliest tokens, and mass of the known tokens."""
    target = jax.nn.softmax(hidden @ head.T)
    scores = jnp.where(known, sharpness * (guessed @ head.T), -jnp.inf)
    draft = jax.nn.softmax(scores)
    overlap = jnp.sum(jnp.minimum(target, draft), axis=-1)
    same = jnp.argmax(target, axis=-1) == jnp.argmax(draft, axis=-1)
    return overlap, same, jnp.sum(jnp.where(known, target, 0.0), axis=-1)


def compared(
    world: World,
    known: np.ndarray,
    hidden: np.ndarray,
    guessed: np.ndarray,
    sharpness: float,
    most: int,
) -> tuple[float, float, float]:
    """Means of overlap, agreement and mass, over `most` positions spread evenly."""
    chosen = np.linspace(0, len(hidden) - 1, min(most, len(hidden))).astype(int)
    # Whole chunks, so that one program does all.
    chosen = chosen[: max(len(chosen) // _CHUNK, 1) * _CHUNK]
    parts = [
        _compare(world.head, known, hidden[part], guessed[part], sharpness)
        for part in np.split(chosen, max(len(chosen) // _CHUNK, 1))
    ]
    overlap, same, mass = (np.concatenate(x).mean() for x in zip(*parts, strict=True))
    return float(overlap), float(same), float(mass)


def measure(
    options: argparse.Namespace, context: World, cell: tables.Cell
) -> list[tables.Row]:
    """Regresses and compares."""
    world, most = context, options.positions
    reads, share, width, vocabulary = CASES[cell["case"]]
    records = world.train[: max(round(share * len(world.train)), 1)]
    sets = [
        examples(world, texts, reads)
        for texts in (records, world.choosing, world.held_out)
    ]
    train, choosing, held_out = ((widened(x, width), y) for x, y in sets)
    weights = regress(*train, choosing)
    known = np.ones(len(world.embed), bool)
    if vocabulary:
        counts = vocabulary_lib.drawn(world.train, len(known))
        ids = vocabulary_lib.choose(counts, vocabulary, world.eos_ids)
        known = np.isin(np.arange(len(known)), ids)

    def look(what, sharpness, most):
        guessed = what[0] @ weights
        return compared(world, known, what[1], guessed, sharpness, most)

    sharpness = max(_SHARPNESSES, key=lambda x: look(choosing, x, most // 4)[0])
    overlap, same, mass = look(held_out, sharpness, most)
    return [
        {
            **cell.overrides,
            "inputs": train[0].shape[1],
            "positions": len(train[0]),
            "sharpness": sharpness,
            "overlap": overlap,
            "overlap_own": look(train, sharpness, most)[0],
            "same_top": same,
            "known_mass": mass,
        }
    ]


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws both overlaps of every case."""
    fig, axes = plotting.figure(
        "What a first guess can be told from, by regression",
        "overlap with the target's law (1 - total variation)",
        "",
        stamp,
    )
    for place, row in enumerate(reversed(rows)):
        ends = [row["overlap"], row["overlap_own"]]
        axes.plot(ends, [place] * 2, "-", color=plotting.PALE, linewidth=4)
        for name, color, label in (
            ("overlap", plotting.COLORS[0], "held-out texts"),
            ("overlap_own", plotting.COLORS[1], "its own texts"),
        ):
            shown = None if place else label
            axes.plot([row[name]], [place], "o", color=color, label=shown)
    axes.set_yticks(range(len(rows)), [row["case"] for row in reversed(rows)])
    return fig


def _gains(first: str, second: str, least: float):
    """Decides whether the second case overlaps by so much more on held-out texts."""

    def decide(rows: claims.Rows) -> claims.Finding:
        before, after = (
            claims.only(rows, case=case)["overlap"] for case in (first, second)
        )
        return after - before >= least, f"{before:.3f}, then {after:.3f}"

    return decide


def _few_tokens_suffice(rows: claims.Rows) -> claims.Finding:
    found: Mapping = claims.only(rows, case="8192 tokens")
    return found["known_mass"] >= 0.99, f"mass of 8192 tokens {found['known_mass']:.4f}"


EXPERIMENT = experiment.Experiment(
    slug="drafter_limits",
    text=__doc__,
    title="what limits a drafter's first guess: reading, text, width, vocabulary",
    needs="--texts=workdirs/general_drafter/texts",
    options=(
        experiment.Option("texts", "", "of a drafter's training", recorded=False),
        experiment.Option("model", "smollm2-135m-instruct"),
        experiment.Option("positions", 2048, "that laws are compared at"),
    ),
    check=check,
    context=load,
    constants={"cases": CASES},
    cells=lambda: [tables.Cell({"case": case}, None) for case in CASES],
    measure=measure,
    plot=plot,
    claims={
        "three layers tell 0.02 more of the next law than the last feature": _gains(
            "last feature", BASE, 0.02
        ),
        "four times the text brings 0.02 or more: text is what lacks": _gains(
            "1/4 of the texts", BASE, 0.02
        ),
        "a hidden layer brings 0.02 or more: width is what lacks": _gains(
            BASE, "width 1536", 0.02
        ),
        "the position before brings 0.02 or more": _gains(
            BASE, "and the position before", 0.02
        ),
        "8192 tokens have 99 % of the target's law": _few_tokens_suffice,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
