"""What ends a run with a message instead of a traceback."""


class TrainingError(RuntimeError):
    """The run cannot go on; the message names the cause and the remedy."""


class NotFiniteError(TrainingError):
    """Updates are not finite any more."""
