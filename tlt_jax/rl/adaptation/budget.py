"""How long to train a drafter where nobody waits, so that the time comes back.

With one worker, training stands between rollout and update. It pays if the rollouts to
come get shorter by more than it takes: decoding takes time in proportion to one over
the accept length L, and x seconds of training raise L by about g x, as they did before.
Over the next H rollouts of R seconds the gain is H R (1 - L / (L + g x)) - x, which is
largest at x = (sqrt(H R L g) - L) / g. Where that is not above zero nothing is spent,
but for a short probe now and then: the target moves on, and what did not pay may pay
again.
"""

import dataclasses
import math

# Rollouts over which a better drafter is counted on; then the target has moved.
_HORIZON = 4.0
# Steps without training before it is tried again, and the part of the limit it gets.
_PROBE_AFTER, _PROBE_FRAC = 8, 0.1
# Weight of the newest measurement.
_NEWEST = 0.5


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is known of training's worth.

    Attributes:
      gain_per_s: rise of the accept length per second of training; None: not measured.
      accept_length: as last measured.
      num_idle: steps since the last training.
    """

    gain_per_s: float | None = None
    accept_length: float = 1.0
    num_idle: int = 0

    def seconds(self, rollout_s: float, max_frac: float) -> float:
        """Decide how many seconds to train now; 0: not at all.

        `rollout_s` is R of the last rollout, of which `max_frac` is the most.
        """
        most = max_frac * rollout_s
        if self.gain_per_s is None:
            return most
        if self.gain_per_s > 0:
            level, gain = self.accept_length, self.gain_per_s
            best = (math.sqrt(_HORIZON * rollout_s * level * gain) - level) / gain
            if best > 0:
                return min(best, most)
        return _PROBE_FRAC * most if self.num_idle >= _PROBE_AFTER else 0.0

    def trained(self, seconds: float, before: float, after: float) -> "Budget":
        """Take in by what a training of `seconds` (above 0) raised the accept length.

        It was measured on texts that the training did not see.
        """
        gain = (after - before) / seconds
        if self.gain_per_s is not None:
            gain = _NEWEST * gain + (1 - _NEWEST) * self.gain_per_s
        return Budget(gain, after)

    def skipped(self) -> "Budget":
        """Count a step without training."""
        return dataclasses.replace(self, num_idle=self.num_idle + 1)
