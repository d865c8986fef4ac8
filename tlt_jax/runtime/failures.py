"""What ends a run with a message instead of a traceback."""


class UserError(RuntimeError):
    """What a user can mend; the message names the cause and the remedy."""


class TrainingError(UserError):
    """The run cannot go on."""


class NotFiniteError(TrainingError):
    """Updates are not finite any more."""


class Abandoned(Exception):
    """Work was given up because its run shall stop."""


class Stopped(KeyboardInterrupt):
    """A run has stopped as it was asked to; the message says where it is.

    Attributes:
      status: the process's exit status: 128 and the signal's number.
    """

    def __init__(self, message: str, status: int):
        """Say where the run is."""
        super().__init__(message)
        self.status = status
