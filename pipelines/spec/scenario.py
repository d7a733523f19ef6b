"""The section of a spec that divides a data set into a stream of tasks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from graftwork.operators.names import normal
from graftwork.operators.streams.scenario import FORMER, LISTED, MAX_SEED, OrderName, expand
from graftwork.pipelines.spec.data import MAX_COUNT, checked_at
from graftwork.pipelines.spec.data import seed as seeding
from graftwork.pipelines.spec.fields import (
    PLACE,
    Before,
    Place,
    Rule,
    Section,
    choice,
    integer,
    listing,
    no_duplicates,
    optional,
    optionally,
    real,
    refuse,
)
from graftwork.pipelines.spec.problems import shown

_count = integer(1, MAX_COUNT)


def _orders(value: Any) -> tuple[Any, ...]:
    """All accepted ways of writing orders, one by one."""
    if value == "natural":
        return expand("natural")
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("count", "first")]
        if unknown:
            raise refuse('unknown key; an order sweep has "count" and "first"', (unknown[0],))
        if "count" not in value:
            raise refuse("missing; say how many orders", ("count",))
        count = checked_at("count", integer(1, 10_000).check, value["count"])
        first = checked_at("first", integer(0, MAX_SEED + 1 - count).check, value.get("first", 0))
        return expand({"count": count, "first": first})
    says = 'seeds, "natural" and explicit lists; or "natural", or {count: n, first: 0}'
    return listing(says).change(value)


def _order(value: Any) -> Any:
    if value == "natural" or (isinstance(value, str) and FORMER.fullmatch(value)):
        return value
    if isinstance(value, (list, tuple)):
        if not value:
            raise refuse("an explicit order must not be empty")
        return _ids("an explicit order", value)
    if isinstance(value, str):
        raise refuse(f'must be a seed, "natural", "SEED of COUNT" or a list, got {shown(value)}')
    return seeding.check(value)


def _ids(what: str, value: Any) -> list[int] | list[str]:
    """Class ids, or names of classes or domains, each once."""
    numbers = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    if not numbers and not all(isinstance(item, str) for item in value):
        raise refuse(f"{what} must hold class ids, or names in quotes")
    value = [normal(item) if isinstance(item, str) else item for item in value]
    repeated = [item for index, item in enumerate(value) if item in value[:index]]
    if repeated:
        raise refuse(f"{what} must not repeat {shown(repeated[0])}")
    return value


def _stop_or_groups(value: Any) -> int | tuple[list[int] | list[str], ...] | None:
    """Number of tasks, or what each of them has."""
    if not isinstance(value, (list, tuple)):
        return optional(_count).check(value)
    if not value:
        raise refuse("must list at least one task, got an empty list")
    found = []
    for index, group in enumerate(value):
        if not isinstance(group, (list, tuple)) or not group:
            raise refuse(f"must be a list of classes or domains, got {shown(group)}", (index,))
        found.append(checked_at(index, partial(_ids, "a task"), group))
    if len({type(item) for group in found for item in group}) > 1:
        raise refuse("must hold either class ids or names, not both")
    return tuple(found)


_percent = integer(0, 100)


class Blurry(Section):
    """Si-Blurry: some classes belong to one task, images of the others are mixed over all."""

    tasks: Annotated[int, integer(2, 100_000)] = Field(description="how many tasks there are")
    disjoint: Annotated[int, _percent] = Field(
        default=50, description="percentage of the classes that come with one task alone"
    )
    mixed: Annotated[int, _percent] = Field(
        default=10,
        description="percentage of the other classes' images that is dealt over all tasks",
    )
    cuts: Annotated[Literal["even", "drawn"], choice(("even", "drawn"))] = Field(
        default="even", description="equally many classes for each task, or drawn boundaries"
    )


class FewShot(Section):
    """Few training images of each class after the first task."""

    shots: Annotated[int, _count] = Field(description="training images of each such class")
    seed: Annotated[int | None, optional(seeding)] = Field(
        default=None, description="of the images that are drawn; null: the first in file order"
    )


class LongTailed(Section):
    """Numbers of training images that fall from class to class by one factor."""

    imbalance: Annotated[float, real(1, 1e6)] = Field(
        description="training images of the largest class, divided by those of the smallest"
    )
    order: Annotated[Literal["ordered", "shuffled"], choice(("ordered", "shuffled"))] = Field(
        default="ordered", description="ever rarer classes in learning order, or shuffled numbers"
    )
    seed: Annotated[int, seeding] = Field(default=0, description="of the shuffling")
    many: Annotated[int, _count] = Field(
        default=100, description="accuracy of classes with more training images is shown"
    )
    few: Annotated[int, _count] = Field(
        default=20, description="accuracy of classes with fewer training images is shown"
    )


class Online(Section):
    """One pass over all images in sections, without task boundaries."""

    every: Annotated[int, _count] = Field(
        description="images between two evaluations; what a learner takes for a task"
    )
    batch_size: Annotated[int, _count] = Field(
        default=64, description="images of a step of a trained method, in place of its own"
    )
    times: Annotated[int, integer(1, 1000)] = Field(
        default=1, description="steps on each batch, each with fresh augmentation"
    )
    mask: Annotated[Literal["method", "batch"], choice(("method", "batch"))] = Field(
        default="method",
        description="classes that a training step chooses from: as the method says, or those of "
        "the batch alone",
    )


_NOT_BESIDE_MANIFEST = "not beside manifest, which says all about tasks; remove it"
_APART = {
    "tasks": ("sizes",),
    "blurry": ("sizes", "tasks"),
    "few_shot": ("blurry",),
    "long_tailed": ("blurry", "few_shot"),
}
"""Key -> keys in front of it that say the same in another way."""


def _cuts(given: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of some keys that says how the data are cut; None if none does."""
    values = ((name, given.get(name)) for name in names)
    return next((n for n, value in values if not isinstance(value, int | None)), None)


class Scenario(Section):
    """Division of the data into a stream of tasks."""

    manifest: Annotated[Place | None, optional(PLACE)] = Field(
        default=None,
        description="file of `graftwork split` to follow, instead of everything else here but "
        "online",
    )
    kind: Annotated[
        Literal["class_incremental", "domain_incremental"] | None,
        optional(choice(("class_incremental", "domain_incremental"))),
    ] = Field(
        default=None,
        description="new classes with every task, or a new domain with every task; required "
        "without manifest",
        validate_default=True,
    )
    sizes: Annotated[
        tuple[Annotated[int, _count], ...] | None, optionally(listing("numbers of classes"))
    ] = Field(
        default=None,
        description="classes of each task, instead of initial and increment; or domains",
    )
    tasks: Annotated[
        int | tuple[list[int] | list[str], ...] | None,
        Rule(_stop_or_groups, "integer, list of lists of classes or domains, or null"),
    ] = Field(
        default=None,
        description="classes (or domains) of each task; or a number: stop after so many tasks",
    )
    blurry: Blurry | None = Field(
        default=None, description="classes that are mixed over tasks; class_incremental only"
    )
    increment: Annotated[int | None, optional(_count)] = Field(
        default=None,
        description="classes of each task after the first; class_incremental, which needs it "
        "where neither sizes nor tasks nor blurry say more",
        validate_default=True,
    )
    initial: Annotated[int | None, optional(_count)] = Field(
        default=None,
        description="classes of the first task, `increment` if absent; class_incremental only",
        validate_default=True,
    )
    few_shot: FewShot | None = Field(
        default=None, description="few images after the first task; class_incremental only"
    )
    long_tailed: LongTailed | None = Field(
        default=None, description="ever fewer images; class_incremental only"
    )
    online: Online | None = Field(
        default=None, description="images one by one, evaluated every so many"
    )
    orders: Annotated[
        tuple[Annotated[OrderName, Rule(_order, "order")], ...],
        Before(_orders, 'list of seeds, "natural" and explicit lists; {count, first}; "natural"'),
    ] = Field(
        default=None,
        description="class (or domain) orders; absent: [1993], natural for domain_incremental",
        validate_default=True,
    )

    @property
    def words(self) -> str:
        """The way of cutting, in words."""
        base = "blurry" if self.blurry else (self.kind or "as in a manifest").replace("_", " ")
        more = {"few-shot": self.few_shot, "long-tailed": self.long_tailed, "online": self.online}
        return ", ".join([base, *(word for word, given in more.items() if given)])

    @property
    def groups(self) -> tuple[list[int] | list[str], ...] | None:
        """Classes or domains of each task, where they are listed."""
        return self.tasks if isinstance(self.tasks, tuple) else None

    @property
    def whole_classes(self) -> bool:
        """Tells whether a task has all training images of its classes, and no other has any."""
        thinned = self.few_shot or self.long_tailed or self.blurry or self.online
        return self.kind == "class_incremental" and not thinned

    @field_validator("kind")
    @classmethod
    def _kind_or_manifest(cls, value: str | None, info: ValidationInfo) -> str | None:
        if "manifest" in info.data and (value is None) == (info.data["manifest"] is None):
            if value is None:
                raise refuse("missing; class_incremental or domain_incremental")
            raise refuse(_NOT_BESIDE_MANIFEST)
        return value

    @field_validator("sizes", "tasks", "blurry", "few_shot", "long_tailed")
    @classmethod
    def _one_cut(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return value
        name, given = str(info.field_name), info.data
        if given.get("manifest") is not None:
            raise refuse(_NOT_BESIDE_MANIFEST)
        if given.get("kind") == "domain_incremental" and name not in ("sizes", "tasks"):
            raise refuse("only for class_incremental; remove it")
        # A number of tasks says when to stop, and stands beside everything.
        other = None if isinstance(value, int) else _cuts(given, _APART.get(name, ()))
        if other is not None:
            raise refuse(f"not beside {other}; remove one of them")
        return value

    @field_validator("increment", "initial")
    @classmethod
    def _fits_kind(cls, value: int | None, info: ValidationInfo) -> int | None:
        given, kind = info.data, info.data.get("kind")
        if kind == "domain_incremental" and value is not None:
            raise refuse("only for class_incremental; every task is one domain, remove it")
        if given.get("manifest") is not None and value is not None:
            raise refuse(_NOT_BESIDE_MANIFEST)
        if (other := _cuts(given, ("sizes", "tasks", "blurry"))) is not None:
            if value is not None:
                raise refuse(f"not beside {other}; remove one of them")
            return None
        if kind == "class_incremental" and value is None:
            if info.field_name == "increment":
                raise refuse("missing; class_incremental needs the number of classes per task")
            return given.get("increment")
        return value

    @field_validator("orders", mode="wrap")
    @classmethod
    def _orders_of_kind(
        cls, value: Any, handler: Callable[[Any], tuple[OrderName, ...]], info: ValidationInfo
    ) -> tuple[OrderName, ...]:
        given, kind = info.data, info.data.get("kind")
        listed = given.get("manifest") is not None or isinstance(given.get("tasks"), tuple)
        if listed:
            if value is not None and value != (LISTED,) and value != [LISTED]:
                raise refuse("not beside listed tasks, which are in order already; remove it")
            return (LISTED,)
        if value is None:
            return ("natural",) if kind == "domain_incremental" else (1993,)
        orders = no_duplicates(handler(value))
        for index, order in enumerate(orders):
            if given.get("blurry") is not None and not isinstance(order, int):
                raise refuse("blurry draws classes by a seed; give seeds", (index,))
            numbers = isinstance(order, list) and isinstance(order[0], int)
            if numbers and kind == "domain_incremental":
                raise refuse(
                    "an explicit order of domain_incremental must hold domain names", (index,)
                )
        return orders
