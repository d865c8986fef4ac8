"""The tuners by name."""

from tlt_jax.runtime import external
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import bandit, cost_model, tuner

NAMES = (
    tuner.Static.NAME,
    tuner.Threshold.NAME,
    bandit.BegMab.NAME,
    cost_model.CostModel.NAME,
)


def build(
    name: str,
    arms: strategy_lib.Arms,
    *,
    max_rows: int,
    seed: int,
    threshold: int = 0,
    hysteresis: int = 0,
    epsilon: float = 0.1,
    window: int = 300,
    cfg: cost_model.CostModelConfig | None = None,
) -> tuner.Tuner:
    """Build a tuner.

    Args:
      name: `static` (one candidate per entry, always), `threshold` (the same from a
        number of rows on downwards), `beg_mab` (the paper's bandit), `cost_model`, or
        a class of one's own, `package.module:Name`, called with arms, max_rows, seed.
      arms: candidates by rows.
      max_rows: of the engine.
      seed: of what is random.
      threshold: of `threshold`: rows at which speculation begins; 0: those of the last
        entry.
      hysteresis: of `threshold`: rows above it at which speculation still goes on.
      epsilon, window: of `beg_mab`.
      cfg: of `cost_model`.

    Raises:
      ValueError: the name is unknown, or the arms or a setting do not fit the tuner.
    """
    if name == tuner.Static.NAME:
        return tuner.Static(arms.table())
    if name == tuner.Threshold.NAME:
        table = arms.table()
        start = threshold or max((limit for limit, _ in table.entries), default=1)
        return tuner.Threshold(table, start, start + hysteresis)
    if name == bandit.BegMab.NAME:
        return bandit.BegMab(arms, seed=seed, epsilon=epsilon, window=window)
    if name == cost_model.CostModel.NAME:
        return cost_model.CostModel(arms, max_rows=max_rows, cfg=cfg)
    if external.is_external(name):
        return external.load("tuner", name)(arms, max_rows=max_rows, seed=seed)
    raise ValueError(f"tuner {name!r} is unknown: use one of {', '.join(NAMES)}.")
