"""Strategies name their proposers, one's own among them."""

import dataclasses

import jax.numpy as jnp
import pytest

from tests.rl import engines
from tests.specdec import hosts
from tlt_jax.models.drafters import drafter
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import speculator
from tlt_jax.specdec import candidates, decode, protocols, strategy
from tlt_jax.specdec.proposers import both, build, learned, ngram

OWN = f"{__name__}:Repeat"


@dataclasses.dataclass(frozen=True)
class Repeat(protocols.Proposer):
    """Guesses that the last token comes again and again."""

    strategy: strategy.Strategy
    settings: decode.Settings

    def propose(self, inputs, state, rows, noise):
        """A chain of the pending token."""
        depth = self.strategy.draft_depth
        shape = (rows.pending.shape[0], depth)
        level = jnp.broadcast_to(jnp.arange(depth), shape)
        return protocols.Proposal(
            candidates.Candidates(
                tokens=jnp.broadcast_to(rows.pending[:, None], shape),
                parents=level - 1,
                depths=level + 1,
                scores=-level.astype(jnp.float32),
            )
        )


def test_a_proposer_of_ones_own_speculates_in_an_engine():
    plain = engines.engine_of()
    expected, _ = plain.run(engines.REQUESTS, engines.SEED)
    plain.pool.close()
    cfg = speculator.SpeculatorConfig(strategy.parse_arms((f"4:D2K1V3-{OWN}",)))
    engine = engine_lib.Engine(engines.CFG, engines.BASE, speculator_cfg=cfg)
    engine.set_params(engines.PARAMS, version=0)
    completions, stats = engine.run(engines.REQUESTS, engines.SEED)
    engine.pool.close()
    tokens = [c.tokens.tolist() for c in completions]
    assert tokens == [c.tokens.tolist() for c in expected]
    assert set(stats.strategies) == {f"D2K1V3-{OWN}"}
    # Of 110 tokens 4 repeat the one before them, none of them twice.
    assert stats.num_accepted == [106, 4, 0]
    assert stats.num_tokens == 110


def test_strategies_name_their_proposers():
    settings = decode.Settings(hosts.CFG)
    cfg = drafter.of_target(hosts.CFG)
    made = {
        text: build.build(strategy.parse(text), settings, cfg)
        for text in ("D2K1V3", "D2K1V3-ngram", "D2K1V4-both", f"D2K1V3-{OWN}")
    }
    assert [type(proposer) for proposer in made.values()] == [
        *(learned.Learned, ngram.NGram, both.Both, Repeat)
    ]
    assert all(str(made[text].strategy) == text for text in made)
    # What is compiled in is equal where it was built alike: programs are shared.
    again = build.build(strategy.parse("D2K1V4-both"), settings, cfg)
    assert again == made["D2K1V4-both"] and hash(again) == hash(made["D2K1V4-both"])


@pytest.mark.parametrize(
    "name,message",
    [
        ("no_such_package.module:Name", "there is no module 'no_such_package'"),
        (f"{__name__}:Nobody", "has no 'Nobody'"),
        (":Name", "accepted is 'package.module:name'"),
    ],
)
def test_a_proposer_that_is_not_there_is_refused_before_anything_runs(name, message):
    table = strategy.parse_arms((f"4:D2K1V3-{name}",))
    with pytest.raises(ValueError, match="proposer") as error:
        engine_lib.Engine(
            engines.CFG,
            engines.BASE,
            speculator_cfg=speculator.SpeculatorConfig(table),
        )
    assert message in str(error.value)
