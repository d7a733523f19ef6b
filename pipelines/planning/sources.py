"""The data sets of a spec, and the images that its stream takes of them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graftwork.operators.data import dataset as datasets
from graftwork.operators.data.dataset import Dataset
from graftwork.operators.data.parts import Examine, here
from graftwork.operators.data.records import Records, name_of
from graftwork.operators.errors import BadDataError, ConfigError, MissingData
from graftwork.operators.files import kinds
from graftwork.operators.files.access import absolute
from graftwork.operators.stage import Stage
from graftwork.operators.store.memo import Memo
from graftwork.operators.streams.listed import Listed
from graftwork.operators.streams.stream import Data, arrange
from graftwork.pipelines.spec.fields import with_places
from graftwork.pipelines.spec.model import PipelineSpec
from graftwork.pipelines.spec.problems import nearest
from graftwork.pipelines.spec.stream import ListedTask


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set of a spec.

    Args:
        dataset: its index.
        key: of the spec's section that names it.
        task: name of the listed task; empty for what is cut.
        record: name of its record in the store; empty for what is cut.
        sealed: whether it was taken from there.
    """

    dataset: Dataset
    key: str
    task: str = ""
    record: str = ""
    sealed: bool = False


def find(spec: PipelineSpec, memo: Memo, examine: Examine = here) -> tuple[Source, ...]:
    """The data sets of a spec: a single one, or those of its tasks.

    Args:
        examine: where images are examined that the memo does not know.

    Raises:
        BadDataError: they cannot be used.
        ConfigError: a place that may not be used, or a sealed task that was never recorded.
        StorageError: a record is damaged.
    """
    if spec.dataset is not None:
        found = datasets.index(spec.dataset.model_dump(mode="json"), memo, examine=examine)
        return (Source(dataset=found, key="dataset"),)
    return tuple(_listed(task, n, memo, examine) for n, task in enumerate(spec.stream or ()))


def _listed(task: ListedTask, number: int, memo: Memo, examine: Examine) -> Source:
    records, key = Records(memo.blobs), f"stream.{number}"
    name = name_of(with_places(task, absolute).recorded())
    try:
        if task.sealed:
            found = records.find(name)
        else:
            found = datasets.index(task.description(), memo, examine=examine)
    except MissingData as error:
        moved = error.moved("dataset", key)
        if not records.has(name):
            raise moved from error
        advice = "sealed: true takes the task as the store has recorded it"
        raise moved.advised(advice) from error
    except (BadDataError, ConfigError) as error:
        raise error.moved("dataset", key) from error
    if found is None:
        raise ConfigError(
            f'the store has no record of "{task.name}" as it is described here; run once without '
            "sealed while its images are there",
            key=f"{key}.sealed",
        )
    return Source(dataset=found, key=key, task=task.name, record=name, sealed=task.sealed)


def remarks(found: Iterable[Source]) -> list[str]:
    """Lines for people about what may be missing from data sets, and what contradicts itself."""
    datasets = [source.dataset for source in found]
    every = kinds.together(entries for each in datasets for entries in each.left_out.values())
    said = kinds.said(every)
    lines = [f"warning{said} (graftwork doctor lists all)"] if said else []
    return lines + [f"warning: {note}" for each in datasets for note in each.notes]


def keep(found: Iterable[Source], memo: Memo) -> None:
    """Records listed tasks that were indexed, so that they can be sealed."""
    for source in found:
        if source.record and not source.sealed:
            Records(memo.blobs).keep(source.record, source.dataset)


def seal(found: Iterable[Source], stages: Iterable[Stage], memo: Memo) -> None:
    """Tells the store which tasks are sealed.

    Args:
        stages: those of their spec, which `cache gc` keeps.
    """
    keys = [stage.key for stage in stages]
    for source in found:
        if source.sealed:
            Records(memo.blobs).seal(source.record, keys)


def data(spec: PipelineSpec, found: Sequence[Source]) -> Data:
    """The images of a spec.

    Raises:
        ConfigError: class names that do not go together.
    """
    if spec.stream is None:
        [only] = found
        return Data(sources=(only.dataset,), stream=None, classes=only.dataset.classes)
    tasks = listed(spec, found)
    stream = arrange([task.piece() for task in tasks])
    return Data(
        sources=tuple(task.dataset for task in tasks), stream=stream, classes=stream.classes
    )


def listed(spec: PipelineSpec, found: Sequence[Source]) -> list[Listed]:
    """The tasks that a spec lists.

    Raises:
        ConfigError: class names that do not go together.
    """
    pairs = zip(spec.stream or (), found, strict=True)
    tasks = [_task(spec, task, source) for task, source in pairs]
    _check_numbers(spec, tasks)
    return tasks


def _task(spec: PipelineSpec, task: ListedTask, source: Source) -> Listed:
    """A task with the names that its classes have in the stream.

    Raises:
        ConfigError: a class that there is not, or two of one name.
    """
    names, rename = source.dataset.classes, task.rename or {}
    for key, given in (("only", task.only or ()), ("rename", tuple(rename))):
        if unknown := sorted(set(given) - set(names)):
            hint = nearest(unknown[0], names)
            raise ConfigError(f'no class "{unknown[0]}"{hint}', key=f"{source.key}.{key}")
    found = Listed(
        name=task.name,
        dataset=source.dataset,
        only=task.only,
        rename=rename,
        domain=task.domain,
        apart=spec.disjoint_classes,
    )
    called = {n: rename.get(names[n], names[n]) for n in found.taken}
    new, count = Counter(called.values()).most_common(1)[0] if called else ("", 0)
    if count > 1:
        old = " and ".join(f'"{names[n]}"' for n, name in called.items() if name == new)
        raise ConfigError(
            f'{old} would both be "{new}"; to make one class of them, write one label',
            key=f"{source.key}.rename",
        )
    return found


def _check_numbers(spec: PipelineSpec, tasks: Sequence[Listed]) -> None:
    """Refuses numbers of one task beside names of another: class 3 is no name for "cat".

    Raises:
        ConfigError: which tasks.
    """
    if spec.disjoint_classes:
        return
    numbered = [n for n, task in enumerate(tasks) if all(c.isdigit() for c in task.called)]
    if numbered and len(numbered) < len(tasks):
        other = next(n for n in range(len(tasks)) if n not in numbered)
        raise ConfigError(
            f'"{tasks[numbered[0]].name}" numbers its classes, "{tasks[other].name}" names them; '
            "give the names, or set disjoint_classes: true",
            key=f"stream.{numbered[0]}.classes",
        )
