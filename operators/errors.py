"""Errors that a user can act on, each with the exit status of the command that meets it.

    GraftworkError
    |- ConfigError          2   usage or spec; nothing was started
    |- IncompatibleError    3   artifacts that do not fit together
    |- StageFailed          4   a stage failed; the message names stage, cause and how to resume
    |- ClusterLost          5   the Ray cluster went away
    |- StorageError         6   the store cannot be read or written
    |  `- DamagedStage      6   a stored file is not what its manifest says
    |- RunHeld              7   the run is held by another process
    |- Diverged             8   NaN or infinity where numbers belong
    |- BadDataError         9   images or labels that cannot be used
    |- OutOfMemory         10   the stage needs more memory than there is
    `- Interrupted        130   Ctrl-C (130) or SIGTERM (143)

Every one of them crosses process borders (Ray pickles exceptions by their `args`).
"""


class GraftworkError(Exception):
    """One line for the user, with the offending value and what to do about it."""

    exit_code = 4


class ConfigError(GraftworkError):
    """The command line or the spec is wrong. May hold several problems, one per line."""

    exit_code = 2


class IncompatibleError(GraftworkError):
    """Artifacts do not fit together, for example weights of another architecture."""

    exit_code = 3


class StageFailed(GraftworkError):
    """A stage of the graph failed for a reason of its own."""

    exit_code = 4


class ClusterLost(GraftworkError):
    """The Ray cluster could not be reached, or went away."""

    exit_code = 5


class StorageError(GraftworkError):
    """The store cannot be read or written."""

    exit_code = 6


class DamagedStage(StorageError):
    """A stored stage is truncated, altered or incomplete.

    Args:
        operator: operator of the stage, also its folder in the store.
        key: content key of the stage.
        reason: what is wrong, with the file's name.
    """

    def __init__(self, operator: str, key: str, reason: str) -> None:
        super().__init__(operator, key, reason)
        self.operator, self.key, self.reason = operator, key, reason

    def __str__(self) -> str:
        return f"stored stage {self.operator}/{self.key[:12]} is damaged: {self.reason}"


class RunHeld(GraftworkError):
    """Another process holds the run."""

    exit_code = 7


class Diverged(GraftworkError):
    """A loss, weight or feature is NaN or infinite."""

    exit_code = 8


class BadDataError(GraftworkError):
    """Images or labels that cannot be used. May hold several problems, one per line."""

    exit_code = 9


class OutOfMemory(GraftworkError):
    """A stage needs more memory than its node has."""

    exit_code = 10


class Interrupted(GraftworkError):
    """The run was stopped by a signal.

    Args:
        signal_number: 2 (SIGINT, exit status 130) or 15 (SIGTERM, exit status 143).
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return "interrupted; run the same command again to resume"
