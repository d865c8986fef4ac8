"""A tuner that the engines of several threads share."""

import threading
from collections.abc import Callable
from typing import Any

from tlt_jax.specdec.tuners import tuner as tuner_lib


class SharedTuner:
    """Has a tuner's methods, one call at a time: what one engine learns serves all."""

    def __init__(self, tuner: tuner_lib.Tuner):
        """Guard `tuner`, which nobody else may use from now on."""
        self._tuner = tuner
        self._lock = threading.Lock()

    def for_engine(self) -> tuner_lib.Tuner:
        """Return who chooses for one more engine: this one, or one of the engine's own.

        The latter is used by one thread, and its state is part of this one's.
        """
        # A tuner of one's own may do without.
        make = getattr(self._tuner, "for_engine", None)
        own = self._tuner if make is None else make()
        return self if own is self._tuner else own

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._tuner, name)

        def guarded(*args):
            with self._lock:
                return method(*args)

        return guarded
