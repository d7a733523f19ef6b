"""The section of a spec that lists its tasks one by one, in order of arrival."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from graftwork.operators.names import normal
from graftwork.pipelines.spec.data import (
    BUILTIN_DATASETS,
    HOLDOUT_SAYS,
    LIMITS_SAYS,
    MAX_PIXELS,
    ClassNames,
    ColumnName,
    Limits,
    LimitsField,
    MaxPixels,
    OnBadImage,
    Share,
    places,
)
from graftwork.pipelines.spec.fields import (
    Place,
    Rule,
    Section,
    choice,
    flag,
    listing,
    naming,
    optional,
    optionally,
    refuse,
)
from graftwork.pipelines.spec.problems import shown

_name = naming(200, forbidden="/")
_class = naming(200)


def _renaming(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise refuse(f"must be a mapping of names to names, got {shown(value)}")
    names: dict[str, str] = {}
    for old, new in value.items():
        if not isinstance(new, str) or not 1 <= len(new.strip()) <= 200:
            raise refuse(f"must be {_class.says}, got {shown(new)}", (str(old),))
        # Keys are text wherever a spec has them: numbers are the names of what has no others.
        if (name := normal(str(old))) in names:
            raise refuse("written twice, as text and as a number; keep one", (name,))
        names[name] = normal(new)
    return names


_WHOSE = {"name", "only", "rename", "sealed", "domain"}
"""Keys that say what becomes of the images, not which there are."""


class ListedTask(Section):
    """A task that brings its own images."""

    name: Annotated[str, _name] = Field(description="of the task, for people; once in a stream")
    builtin: Annotated[str | None, optional(choice(BUILTIN_DATASETS))] = Field(
        default=None, description="name of a data set that needs no files, instead of places"
    )
    train: Annotated[tuple[Place, ...] | None, optionally(places)] = Field(
        default=None, description="as dataset.train", validate_default=True
    )
    test: Annotated[tuple[Place, ...] | None, optionally(places)] = Field(
        default=None, description="as dataset.test", validate_default=True
    )
    only: Annotated[
        tuple[Annotated[str, _class], ...] | None,
        optionally(listing("names of classes", single=True)),
    ] = Field(default=None, description="names of the classes that the task takes; null: all")
    rename: Annotated[
        dict[str, str] | None,
        Rule(_renaming, "mapping of names in the source to other names, or null"),
    ] = Field(default=None, description="names that its classes have in the stream")
    sealed: Annotated[bool, flag()] = Field(
        default=False,
        description="take the task as the store has recorded it, without a look at its images",
    )
    domain: Annotated[str, _class] = Field(
        default="images", description="name of what the images have in common, not a column"
    )
    image: ColumnName = Field(default="image", description="as dataset.image")
    label: ColumnName = Field(default="label", description="as dataset.label")
    classes: ClassNames = Field(default=None, description="as dataset.classes")
    limit_per_class: LimitsField = Field(default=Limits(), description=LIMITS_SAYS)
    holdout: Share = Field(default=0, description=HOLDOUT_SAYS)
    on_bad_image: OnBadImage = Field(default="error", description="as dataset.on_bad_image")
    max_pixels: MaxPixels = Field(default=MAX_PIXELS, description="as dataset.max_pixels")

    @field_validator("train", "test")
    @classmethod
    def _one_source(cls, value: Any, info: ValidationInfo) -> Any:
        builtin = info.data.get("builtin")
        if builtin is None and value is None:
            raise refuse("missing; give files, folders or URLs, or builtin")
        if builtin is not None and value is not None:
            raise refuse("not beside builtin; remove one of them")
        return value

    def description(self) -> dict[str, Any]:
        """The images, as `operators.data.dataset.index` takes them."""
        files = {"image", "label", "classes", "on_bad_image", "max_pixels", "train", "test"}
        others = files if self.builtin else {"builtin"}
        own = self.model_dump(mode="json", exclude=_WHOSE | others)
        # What a task lacks another one may have.
        return own if self.builtin else own | {"domain": None, "part": True}

    def recorded(self) -> dict[str, Any]:
        """Everything that says which images there are, without defaults: the record's name."""
        return self.model_dump(mode="json", exclude=_WHOSE, exclude_defaults=True)


def _once(tasks: tuple[ListedTask, ...]) -> tuple[ListedTask, ...]:
    names = [task.name for task in tasks]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise refuse(f'second task called "{name}"; give it another name', (index, "name"))
    return tasks


StreamField = Annotated[
    tuple[ListedTask, ...] | None,
    optionally(listing("tasks")),
    AfterValidator(lambda tasks: tasks and _once(tasks)),
]
