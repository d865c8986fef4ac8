"""Steps that are shown are those that decode; pictures show what they hold."""

import jax
import numpy as np
import pytest
from matplotlib import colors

from tests.rl import engines
from tlt_jax import policy, speculation
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import speculator
from tlt_jax.specdec import sampling, strategy
from tlt_jax.viz import style, trace, trees

TREE = strategy.parse("D3K2V5")
PROMPT = np.arange(3, 8, dtype=np.int32)
NEW = 9


class Letters:
    """The least of a tokenizer that a policy and a picture ask for."""

    eos_ids = (engines.EOS,)

    def token_bytes(self, token):
        return bytes([96 + token])


@pytest.fixture(scope="module")
def asked():
    return policy.Policy(engines.CFG, engines.PARAMS, Letters(), "tiny", "float32")


@pytest.fixture(scope="module")
def guessing():
    cfg = drafter.of_target(engines.CFG, output_norm=False)
    made = speculator.SpeculatorConfig(strategy.parse_arms(["1:D3K2V5"]), cfg)
    return speculation.Speculation(made, drafter.init(cfg, jax.random.key(0)))


@pytest.fixture(scope="module")
def tracer(asked, guessing):
    return trace.Tracer(asked, guessing, TREE, max_length=16)


@pytest.fixture(scope="module")
def steps(tracer):
    return tracer.steps(PROMPT, max_new_tokens=NEW, seed=engines.SEED, request_id=4)


def plain():
    request = engines.types.Request(4, 0, 0, PROMPT, NEW)
    return engines.slow(request)[0]


def test_the_text_is_that_of_a_forward_for_every_token(steps):
    drawn = np.concatenate([step.emitted for step in steps])
    assert drawn.tolist() == plain()
    assert max(step.num_accepted for step in steps) > 0
    assert len(steps) < NEW
    for step in steps:
        path = step.path.tolist()
        assert path[0] == 0 and step.valid[path].all()
        # The walk follows the draws, and what it ends with was no child's token.
        assert [step.parents[node] for node in path[1:]] == path[:-1]
        assert step.tokens[path[1:]].tolist() == step.drawn[path[:-1]].tolist()
        kept = step.drawn[path][: len(step.emitted)]
        assert kept.tolist() == step.emitted.tolist()
        for node in np.flatnonzero(step.valid):
            seen = {int(node)}
            while node:
                node = step.parents[node]
                seen.add(int(node))
            assert seen == set(np.flatnonzero(step.sees[max(seen)]))


def test_every_position_is_drafted_from_on_the_same_text(tracer):
    first = tracer.first_steps(
        PROMPT, max_new_tokens=NEW, seed=engines.SEED, request_id=4
    )
    assert [int(step.drawn[0]) for step in first] == plain()
    assert [len(step.text) for step in first] == list(
        range(len(PROMPT), len(PROMPT) + len(plain()))
    )


def test_what_cannot_be_shown_is_refused(asked, guessing, tracer):
    def make(drafts=guessing, shape=TREE, **settings):
        trace.Tracer(asked, drafts, shape, max_length=16, **settings)

    nothing = speculation.Speculation(guessing.speculator_cfg, None)
    with pytest.raises(ValueError, match="without a learned drafter: give"):
        make(nothing)
    with pytest.raises(ValueError, match="without a learned drafter"):
        make(shape=strategy.parse("D3K2V5-both"))
    with pytest.raises(ValueError, match="temperature=0 draws nothing"):
        make(sampling_cfg=sampling.SamplingConfig(temperature=0))
    with pytest.raises(ValueError, match="use one of coupled, deterministic"):
        make(ranking="best")
    with pytest.raises(ValueError, match="need 1 to 16 tokens"):
        tracer.steps(PROMPT, max_new_tokens=12)


def labels(axes):
    return [text.get_text() for text in axes.texts]


def test_pictures_show_the_step(steps):
    name = trees.names_of(Letters())
    step = max(steps, key=lambda step: step.num_accepted)
    (axes,) = trees.tree(step, name).axes
    boxes = [colors.to_hex(box.get_facecolor()).upper() for box in axes.patches]
    num_valid = int(step.valid.sum())
    assert len(boxes) == num_valid + 1
    assert boxes.count(style.GREEN) == step.num_accepted
    assert boxes[-1] == style.ORANGE
    assert labels(axes)[-1] == name(int(step.drawn[step.path[-1]]))
    (axes,) = trees.mask(step, name).axes
    shades = axes.collections[0].get_array().reshape(num_valid, -1)[:, -num_valid:]
    np.testing.assert_array_equal(shades > 0, step.sees[step.valid][:, step.valid])
    law, scores = trees.draw_at(step, 0, name).axes
    heights = [bar.get_height() for bar in scores.patches]
    told = [tick.get_text() for tick in scores.get_xticklabels()]
    assert told[int(np.argmax(heights))] == name(int(step.drawn[0]))
    assert sum(bar.get_height() for bar in law.patches) <= 1 + 1e-6
    (axes,) = trees.text(steps, name).axes
    assert labels(axes) == [name(int(t)) for s in steps for t in s.emitted]
    _, axes = trees.acceptance({"a": steps, "b": steps}, name).axes
    assert labels(axes) == [str(s.num_accepted) for s in steps] * 2
    (axes,) = trees.rates({"a": [0.5, 0.25], "b": [0.75]}).axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.25, 0.75]
    assert style.picture(axes.figure)._repr_png_().startswith(b"\x89PNG")
