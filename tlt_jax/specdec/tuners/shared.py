"""A tuner that the engines of several threads share."""

import threading
from typing import Any

from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import tuner as tuner_lib


class SharedTuner:
    """Calls a tuner's methods one at a time: what one engine learns serves all."""

    def __init__(self, tuner: tuner_lib.Tuner):
        """Guard `tuner`, which nobody else may use from now on."""
        self._tuner = tuner
        self._lock = threading.Lock()

    def strategies(self, num_rows: int) -> tuple[strategy_lib.Strategy | None, ...]:
        """See `tuner.Tuner`."""
        with self._lock:
            return self._tuner.strategies(num_rows)

    def choose(self, num_rows: int) -> strategy_lib.Strategy | None:
        """See `tuner.Tuner`."""
        with self._lock:
            return self._tuner.choose(num_rows)

    def record(self, call: tuner_lib.Call) -> None:
        """See `tuner.Tuner`."""
        with self._lock:
            self._tuner.record(call)

    def changed(self, what: tuner_lib.Updated) -> None:
        """See `tuner.Tuner`."""
        with self._lock:
            self._tuner.changed(what)

    def state(self) -> dict[str, Any]:
        """See `tuner.Tuner`."""
        with self._lock:
            return self._tuner.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See `tuner.Tuner`."""
        with self._lock:
            self._tuner.restore(state)
