"""Groups of a step: shaping, packing, comparing, hashing, recording."""

import dataclasses

import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import algorithms, experience, packing

# printf '\1\0\0\0\2\0\0\0\0\0\1\0' | sha256sum
DIGEST = "b9f5fe6ff037564f7628f61b720ece17b215389c80de1c7c9dc538029eaf63e3"


def prompt(prompt_id, num_tokens=2):
    example = types.Example(f"e{prompt_id}", "text", "answer")
    tokens = 10 * prompt_id + np.arange(num_tokens, dtype=np.int32)
    return prompts.Prompt(prompt_id, example, tokens)


def completion(request_id, tokens, reason="eos", logprobs=None):
    tokens = np.asarray(tokens, np.int32)
    if logprobs is None:
        logprobs = -np.ones(len(tokens))
    return types.Completion(
        request_id, tokens, np.asarray(logprobs, np.float32), reason
    )


def batch(first_id=0, rewards=((0.0, 1.0), (1.0, 3.0)), lengths=(1, 2, 3, 4)):
    """Groups of two whose completion i has tokens i, i, ..."""
    ids = range(first_id, first_id + len(lengths))
    return experience.Experience(
        [prompt(first_id + i) for i in range(len(rewards))],
        [completion(i, [i] * n) for i, n in zip(ids, lengths, strict=True)],
        np.array(rewards),
    )


def ids(made):
    return [c.request_id for c in made.completions]


def algorithm(**changes):
    """The estimator that only subtracts the group's mean, nothing else on."""
    settings = algorithms.preset("dr_grpo") | changes
    return algorithms.build(settings)


def test_select_and_join_keep_groups_whole():
    made = batch()
    assert made.group_size == 2
    second = made.select([1])
    assert ids(second) == [2, 3] and second.prompts[0].prompt_id == 1
    np.testing.assert_array_equal(second.rewards, [[1.0, 3.0]])
    joined = second.join(batch(first_id=4))
    assert ids(joined) == [2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(joined.rewards, [[1, 3], [0, 1], [1, 3]])
    assert ids(made.select([1, 0])) == [2, 3, 0, 1]
    assert ids(made.select([])) == [] and made.select([]).rewards.shape == (0, 2)
    np.testing.assert_array_equal(joined.lengths, [3, 4, 1, 2, 3, 4])


def test_logprobs_are_replaced_where_they_belong():
    made = batch()
    own = [np.full(len(c.tokens), -9.0 - i) for i, c in enumerate(made.completions)]
    second = made.select([1])
    assert made.places_of(second) == [1] and made.places_of(made) == [0, 1]
    changed = second.with_logprobs(own[2:])
    assert [x.tolist() for x in changed.logprobs] == [[-11.0] * 3, [-12.0] * 4]
    back = made.with_logprobs_of(changed)
    assert [float(x[0]) for x in back.logprobs] == [-1.0, -1.0, -11.0, -12.0]
    assert [x[0] for x in made.logprobs] == [-1.0] * 4
    np.testing.assert_array_equal(back.rewards, made.rewards)


def test_groups_are_trees_of_prompt_and_completions():
    first, second = batch().groups()
    np.testing.assert_array_equal(first.prompt, [0, 1])
    np.testing.assert_array_equal(second.prompt, [10, 11])
    assert [list(r) for r in second.responses] == [[2, 2, 2], [3, 3, 3, 3]]


def test_advantages_of_bare_rewards():
    got = experience.advantages_of(batch(), algorithm(), 10, None)
    np.testing.assert_allclose(got, [-0.5, 0.5, -1.0, 1.0])
    assert got.dtype == np.float32


def test_overlong_shaping_acts_before_the_group_is_compared():
    """Limit 4, buffer half of it: lengths 3 and 4 lose 0.5 and 1 of the penalty."""
    shaped = algorithm(
        overlong_shaping=True, overlong_buffer_frac=0.5, overlong_penalty=2.0
    )
    got = experience.advantages_of(batch(), shaped, 4, None)
    # Second group: 1 - 1 = 0 and 3 - 2 = 1.
    np.testing.assert_allclose(got, [-0.5, 0.5, -0.5, 0.5])


def test_kl_as_reward_acts_before_the_group_is_compared():
    """k1 summed over tokens: log-probabilities are -1, the reference's -1.5."""
    made = batch()
    reference = [np.full(len(c.tokens), -1.5, np.float32) for c in made.completions]
    kind = algorithm(kl_coef=0.2, kl_estimator="k1", kl_placement="reward")
    got = experience.advantages_of(made, kind, 10, reference)
    # Lengths 1, 2, 3, 4: 0.1 a token less, so 0.05 about each group's mean.
    np.testing.assert_allclose(got, [-0.45, 0.45, -0.95, 0.95], atol=1e-6)
    in_loss = algorithm(kl_coef=0.2, kl_estimator="k1", kl_placement="loss")
    unchanged = experience.advantages_of(made, in_loss, 10, reference)
    np.testing.assert_allclose(unchanged, [-0.5, 0.5, -1.0, 1.0])


def test_groups_of_equal_rewards_give_no_advantage():
    made = batch(rewards=((0.3, 0.3), (0.0, 1.0)))
    for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"):
        got = experience.advantages_of(made, algorithm(advantage=name), 10, None)
        assert got[0] == got[1] == 0.0 and got[2] < 0.0 < got[3]


def test_micro_batches_hold_every_token_once():
    made = batch()
    layout = experience.Layout(row_tokens=16, rows_per_micro_batch=1)
    parts, micro = experience.micro_batches(
        made,
        layout,
        algorithm(importance_cap=2.0),
        np.arange(4, dtype=np.float32),
        max_new_tokens=8,
        old_logprobs=made.logprobs,
        ref_logprobs=None,
    )
    assert len(parts) == len(micro) and all(p.tokens.shape[0] == 1 for p in parts)
    assert sum(int(part.valid.sum()) for part in parts) == 10
    columns = [part.columns for part in micro]
    assert all(c.rollout_logprobs is not None for c in columns)
    assert all(c.ref_logprobs is None for c in columns)
    total = sum(
        float(np.sum(np.asarray(c.weights)[p.valid]))
        for c, p in zip(columns, parts, strict=True)
    )
    # `constant`: each of 10 tokens weighs 1 / (4 sequences * 8).
    assert total == pytest.approx(10 / 32)


def mismatch(made, trainer):
    """The record's value if the trainer's own log-probabilities are `trainer`."""
    layout = experience.Layout(row_tokens=16, rows_per_micro_batch=1)
    parts = layout.pack(made)
    values = [packing.gather(part, trainer) for part in parts]
    return experience.max_mismatch(made, packing.scatter(parts, values))


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (3, 3)])
def test_mismatch_is_the_largest_difference_of_any_token(place):
    rng = np.random.default_rng(0)
    made = batch()
    made = dataclasses.replace(
        made,
        completions=[
            dataclasses.replace(c, logprobs=rng.normal(size=len(c.tokens)))
            for c in made.completions
        ],
    )
    trainer = [np.array(x) + 1e-4 for x in made.logprobs]
    assert mismatch(made, trainer) == pytest.approx(1e-4, rel=1e-2)
    trainer[place[0]][place[1]] -= 0.25
    assert mismatch(made, trainer) == pytest.approx(0.25 - 1e-4, rel=1e-5)
    trainer[0][0] = np.nan
    assert np.isnan(mismatch(made, trainer))


def test_tokens_digest_is_that_of_little_endian_words():
    made = [completion(5, [1, 2]), completion(3, [1 << 16])]
    assert experience.tokens_digest(made) == DIGEST
    assert experience.tokens_digest(made[::-1]) != DIGEST
    # An array of another integer type says the same.
    wide = dataclasses.replace(made[0], tokens=np.array([1, 2], np.int64))
    assert experience.tokens_digest([wide, made[1]]) == DIGEST


def test_record_of_rewards_and_lengths():
    made = batch(rewards=((0.5, 0.5), (0.0, 1.0)))
    completions = [*made.completions[:3], completion(3, [3] * 4, "length")]
    row = experience.reward_and_length_row(made.rewards, completions)
    digest = row.pop("rollout/tokens_digest")
    assert digest == experience.tokens_digest(completions)
    assert row == {
        "reward/mean": 0.5,
        "reward/std": pytest.approx(np.sqrt(0.125)),
        "reward/zero_std_frac": 0.5,
        "length/mean": 2.5,
        "length/p50": 2.5,
        "length/p95": pytest.approx(3.85),
        "length/max": 4,
        "length/clipped_frac": 0.25,
        "rollout/tokens": 10,
    }


def test_widths_decide_all_shapes():
    layout = experience.Layout(row_tokens=18, rows_per_micro_batch=2)
    assert layout.widths == [18, 15, 10, 5]

    def shapes(made):
        (part,) = layout.pack(made)
        return part.tokens.shape, part.target.shape, part.num_sequences

    prepared = [shapes(experience.filling(w, 2, 2)) for w in layout.widths]
    assert [shape for shape, _, _ in prepared] == [(2, w) for w in layout.widths]
    # Prompts of one token: rows of 3 + 3 + 1, 2 + 1 + 1 and so on.
    for lengths in ((1, 1, 1, 0), (1, 2, 1, 1), (5, 5, 1, 0), (8, 8, 8, 8)):
        assert shapes(batch(lengths=lengths)) in prepared


def test_groups_without_signal_are_counted():
    rewards = ((0.0, 1.0), (1.0, 1.0), (2.0, 2.0))
    made = batch(rewards=rewards, lengths=(1,) * 6)
    row = experience.reward_and_length_row(made.rewards, made.completions)
    assert row["reward/zero_std_frac"] == pytest.approx(2 / 3)
