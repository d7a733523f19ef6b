"""Says which stages need images of sealed tasks that are gone."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.operators.data import presence
from graftwork.operators.errors import BadDataError, together
from graftwork.operators.stage import Stage
from graftwork.pipelines.planning.plan import Plan

NAMED = 3
"""At most so many stages, and files, stand in a line."""


@dataclass(frozen=True, kw_only=True)
class Gone:
    """Images of a sealed task that a run would need and that are gone.

    Args:
        task: its name.
        key: of the spec's section that lists it.
        stages: labels of the stages that need them.
        files: the files that are missing.
    """

    task: str
    key: str
    stages: tuple[str, ...]
    files: tuple[str, ...]

    def error(self) -> BadDataError:
        """One line for the user."""
        count = len(self.stages)
        need = "one stage needs" if count == 1 else f"{count} stages need"
        return BadDataError(
            f'"{self.task}" is sealed, and {need} images of it that are gone: '
            f"{_some(self.stages)}; missing: {_some(self.files)}",
            key=self.key,
            advice="bring them back, or leave out what needs them",
        )


def refuse(found: Sequence[Gone]) -> None:
    """Ends a run before anything is computed.

    Raises:
        BadDataError: images are gone; a line for each task.
    """
    if found:
        raise together([each.error() for each in found])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def gone(plan: Plan, missing: Sequence[Stage]) -> tuple[Gone, ...]:
    """Sealed tasks whose images are gone, if they are needed; each file is asked for once.

    A file that is there may still be another one: who reads it compares the images' digests.

    Args:
        missing: stages that a run has to compute.

    Raises:
        BadDataError: whether a file is there cannot be told.
    """
    owners: dict[str, list[int]] = defaultdict(list)
    for number, source in enumerate(plan.sources):
        if source.sealed:
            data = source.dataset
            for file in {*data.train.where.files, *data.test.where.files}:
                owners[file].append(number)
    if not owners:
        return ()
    opened = {
        stage.key: {*presence.files_of(stage.hints.get("places", {}))} & owners.keys()
        for stage in missing
    }
    absent = presence.gone(sorted(set().union(*opened.values())))
    stages: dict[int, list[str]] = defaultdict(list)
    files: dict[int, set[str]] = defaultdict(set)
    for stage in missing:
        lost = opened[stage.key] & absent
        for file in lost:
            for number in owners[file]:
                files[number].add(file)
        for number in sorted({number for file in lost for number in owners[file]}):
            stages[number].append(stage.label)
    return tuple(
        Gone(
            task=plan.sources[number].task,
            key=plan.sources[number].key,
            stages=tuple(stages[number]),
            files=tuple(sorted(files[number])),
        )
        for number in sorted(stages)
    )
