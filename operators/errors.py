"""Errors that a user can act on, each with the exit status of the command that meets it.

    GraftworkError
    |- ConfigError          2   usage or spec; nothing was started
    |- IncompatibleError    3   artifacts that do not fit together
    |  `- ChangedWeights    3   weights are not those that were planned with
    |- StageFailed          4   a stage failed; the message names stage, cause and how to resume
    |- ClusterLost          5   the Ray cluster went away
    |- StorageError         6   the store cannot be read or written
    |  `- DamagedStage      6   a stored file is not what its manifest says
    |- RunHeld              7   the run is held by another process
    |- Diverged             8   NaN or infinity where numbers belong
    |- BadDataError         9   images or labels that cannot be used
    |  `- MissingData       9   a file or folder of images is not there
    |- OutOfMemory         10   the stage needs more memory than there is
    `- Interrupted        130   Ctrl-C (130) or SIGTERM (143)

An error carries facts: the key of the spec, the offending value, what is wrong. A layer that knows
more adds a fact (`about`, `moved`, `placed`) and decides by facts; the text is made of them once,
where it is printed. Every error crosses process borders with its facts, also through Ray.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

E = TypeVar("E", bound="GraftworkError")


class GraftworkError(Exception):
    """One line for the user, with the offending value and what to do about it.

    Args:
        what: what is wrong, and what to do about the value.
        key: dotted path of the spec's value that is to blame, or the option of a command; empty if
            there is none.
        value: the offending value, where the line names it before what is wrong.
        advice: what to write under the key instead. A layer that has the value from elsewhere
            says something else.
        place: `FILE:LINE` where the key's value was written, or the option.
    """

    exit_code = 4

    def __init__(
        self, what: str = "", *, key: str = "", value: str = "", advice: str = "", place: str = ""
    ) -> None:
        super().__init__(what)
        self.what, self.key, self.value, self.advice = what, key, value, advice
        self.place = place
        self.parts: tuple[GraftworkError, ...] = ()
        """The problems of an error that holds several, see `together`; its own facts are empty."""

    def lines(self) -> list[str]:
        """One line per problem: `place: key: value: what; advice`, of what is known."""
        if self.parts:
            return list(dict.fromkeys(line for part in self.parts for line in part.lines()))
        facts = (self.place, self.key, self.value, self.what)
        line = ": ".join(fact for fact in facts if fact)
        return [f"{line}; {self.advice}" if self.advice else line]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by calling the class, as exceptions do: it may take other arguments than `args`.
        return _restored, (type(self), self.args, self.__dict__)

    def about(self, key: str) -> Self:
        """The error with this key, where it names none."""
        return self._changed(lambda error: {"key": error.key or key})

    def moved(self, old: str, new: str) -> Self:
        """The error with its key in another section: `backbone.model` -> `vit.model`."""

        def key(error: GraftworkError) -> str:
            within = error.key == old or error.key.startswith(f"{old}.")
            return new + error.key[len(old) :] if within else error.key

        return self._changed(lambda error: {"key": key(error)})

    def advised(self, advice: str) -> Self:
        """The error with what to write instead, where it says nothing of that."""
        return self._changed(lambda error: {"advice": error.advice or advice})

    def placed(self, place: Callable[[str], str]) -> Self:
        """The error with the places of its keys, where they are not known.

        Args:
            place: key -> `FILE:LINE`, or empty.
        """
        return self._changed(
            lambda error: {"place": error.place or (error.key and place(error.key))}
        )

    def _changed(self, change: Callable[["GraftworkError"], dict[str, str]]) -> Self:
        """A copy with other facts, of every part if it has some."""
        found = copy.copy(self)
        if self.parts:
            found.parts = tuple(part._changed(change) for part in self.parts)
        else:
            found.__dict__.update(change(self))
        return found


def together(errors: Sequence[E]) -> E:
    """One error for several, of the class of the first; a single one is itself.

    Args:
        errors: at least one, of classes that take `what` alone.
    """
    if len(errors) == 1:
        return errors[0]
    found = type(errors[0])()
    found.parts = tuple(part for error in errors for part in error.parts or (error,))
    return found


def _restored(kind: type[E], args: tuple[Any, ...], facts: dict[str, Any]) -> E:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(facts)
    return error


class ConfigError(GraftworkError):
    """The command line or the spec is wrong. May hold several problems."""

    exit_code = 2


class IncompatibleError(GraftworkError):
    """Artifacts do not fit together, for example weights of another architecture."""

    exit_code = 3


class ChangedWeights(IncompatibleError):
    """The weights of a backbone are not those that were planned with.

    Args:
        model: name of the backbone.
        expected: fingerprint of the weights in the plan.
        loaded: fingerprint of what is there now.
    """

    def __init__(self, model: str, expected: str, loaded: str) -> None:
        super().__init__(
            f"weights of {model} changed since the plan: expected {expected[:12]}, loaded "
            f"{loaded[:12]}; run again",
            key="backbone.weights",
        )
        self.model, self.expected, self.loaded = model, expected, loaded


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
        stage_key: content key of the stage.
        reason: what is wrong, with the file's name.
    """

    def __init__(self, operator: str, stage_key: str, reason: str) -> None:
        super().__init__(f"stored stage {operator}/{stage_key[:12]} is damaged: {reason}")
        self.operator, self.stage_key, self.reason = operator, stage_key, reason


class RunHeld(GraftworkError):
    """Another process holds the run."""

    exit_code = 7


class Diverged(GraftworkError):
    """A loss, weight or feature is NaN or infinite."""

    exit_code = 8


class BadDataError(GraftworkError):
    """Images or labels that cannot be used. May hold several problems."""

    exit_code = 9


class MissingData(BadDataError):
    """A file or folder of images is not there."""


class OutOfMemory(GraftworkError):
    """A stage needs more memory than its node has."""

    exit_code = 10


class Interrupted(GraftworkError):
    """The run was stopped by a signal.

    Args:
        signal_number: 2 (SIGINT, exit status 130) or 15 (SIGTERM, exit status 143).
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted; run the same command again to resume")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
