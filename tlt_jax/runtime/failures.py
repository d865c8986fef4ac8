"""What ends a run with a message instead of a traceback."""


class UserError(RuntimeError):
    """What a user can mend; the message names the cause and the remedy."""


class TrainingError(UserError):
    """The run cannot go on."""


class NotFiniteError(TrainingError):
    """Updates are not finite any more."""
