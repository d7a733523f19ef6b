"""The sections of a spec about data: images, labels and texts."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from graftwork.operators.data.builtin import BUILTIN
from graftwork.operators.streams.scenario import MAX_SEED
from graftwork.pipelines.spec.fields import (
    PLACE,
    Before,
    Place,
    Rule,
    Section,
    choice,
    integer,
    listing,
    naming,
    no_duplicates,
    optional,
    real,
    refuse,
    text,
)
from graftwork.pipelines.spec.problems import shown

BUILTIN_DATASETS = tuple(BUILTIN)
MAX_COUNT = 1_000_000_000
MAX_PIXELS = 89_478_485
"""Number of pixels above which Pillow warns of decompression bombs."""

_count = integer(1, MAX_COUNT)
seed = integer(0, MAX_SEED)
ColumnName = Annotated[str, text()]
Share = Annotated[float, real(0, 0.9)]
OnBadImage = Annotated[Literal["error", "skip"], choice(("error", "skip"))]
MaxPixels = Annotated[int, integer(1, MAX_COUNT)]


class Limits(Section):
    """First rows of each class in each domain, in file order; null means all of them."""

    train: Annotated[int | None, optional(_count)] = Field(
        default=None, description="rows of each class in each domain used for training"
    )
    test: Annotated[int | None, optional(_count)] = Field(
        default=None, description="rows of each class in each domain used for testing"
    )


def _limits(value: Any) -> Any:
    if isinstance(value, (dict, Limits)):
        return value
    limit = optional(_count).check(value)
    return {"train": limit, "test": limit}


LimitsField = Annotated[Limits, Before(_limits, "integer (both splits), mapping, or null")]
LIMITS_SAYS = "first rows of each class in each domain, in file order"
HOLDOUT_SAYS = (
    "share of each class's training images in each domain to test on instead of the test images, "
    "for choosing hyper-parameters; equal images are held out together"
)


class BuiltinDataset(Section):
    """A data set that comes with the package."""

    builtin: Annotated[str, choice(BUILTIN_DATASETS)] = Field(
        description="name of a data set that needs no files"
    )
    limit_per_class: LimitsField = Field(default=Limits(), description=LIMITS_SAYS)
    holdout: Share = Field(default=0, description=HOLDOUT_SAYS)

    @property
    def domain(self) -> None:
        """No built-in data set has domains."""
        return None


places = listing("paths or URLs", single=True)


def checked_at(key: str | int, check: Callable[[Any], Any], value: Any) -> Any:
    """The checked value; a problem with it is reported at `key`."""
    try:
        return check(value)
    except PydanticCustomError as error:
        raise refuse(error.message(), (key,)) from error


def _classes(value: Any) -> str | tuple[str, ...] | None:
    """Path of a JSON list, or the names themselves."""
    if not isinstance(value, (list, tuple)):
        return optional(PLACE).check(value)
    if not value:
        raise refuse("must name at least one class, got an empty list")
    names = tuple(checked_at(index, naming().check, name) for index, name in enumerate(value))
    return no_duplicates(names)


ClassNames = Annotated[
    Place | tuple[str, ...] | None, Rule(_classes, "path of a JSON list, list of names, or null")
]


class FileDataset(Section):
    """Images in files."""

    train: Annotated[tuple[Place, ...], places] = Field(
        description="Parquet file, glob, folder with a folder per class, URL, or a list of those"
    )
    test: Annotated[tuple[Place, ...], places] = Field(description="the same, for testing")
    image: ColumnName = Field(
        default="image", description="column with the encoded image, binary or struct {bytes, path}"
    )
    label: ColumnName = Field(default="label", description="column with the class id")
    domain: Annotated[str | None, optional(text())] = Field(
        default=None, description="column with the domain; domain_incremental needs it"
    )
    classes: ClassNames = Field(
        default=None,
        description="class names by class id; classes without images may be among them",
    )
    limit_per_class: LimitsField = Field(default=Limits(), description=LIMITS_SAYS)
    holdout: Share = Field(default=0, description=HOLDOUT_SAYS)
    on_bad_image: OnBadImage = Field(
        default="error", description="what to do with an image that cannot be decoded"
    )
    max_pixels: MaxPixels = Field(
        default=MAX_PIXELS, description="larger images count as bad images"
    )


def full_dataset(value: Any) -> Any:
    """The section, with a built-in data set's bare name written out."""
    if isinstance(value, str):
        if value not in BUILTIN_DATASETS:
            raise refuse(
                f"no built-in data set {shown(value)} (known: {', '.join(BUILTIN_DATASETS)}); "
                "files are given as {train: ..., test: ...}"
            )
        return {"builtin": value}
    return value


def _dataset_kind(value: Any) -> str:
    has_name = "builtin" in value if isinstance(value, dict) else isinstance(value, BuiltinDataset)
    return "<builtin>" if has_name else "<files>"


Dataset = Annotated[
    Annotated[BuiltinDataset, Tag("<builtin>")] | Annotated[FileDataset, Tag("<files>")],
    Discriminator(_dataset_kind),
]


def _texts(value: Any) -> str | tuple[str, ...]:
    """Path of a JSON list, or the texts themselves."""
    if not isinstance(value, (list, tuple)):
        return PLACE.check(value)
    if not value:
        raise refuse("must hold at least one text, got an empty list")
    return tuple(checked_at(index, text(300).check, item) for index, item in enumerate(value))


class Reference(Section):
    """Images and texts of no task, to which methods that train CLIP whole hold it."""

    images: Annotated[tuple[Place, ...], places] = Field(
        description="as in dataset.train; labels are not used"
    )
    texts: Annotated[
        Place | tuple[str, ...], Rule(_texts, "path of a JSON list, or list of texts")
    ] = Field(description="texts that images are compared with")
    image: ColumnName = Field(
        default="image", description="column with the encoded image, as in dataset"
    )
    label: ColumnName = Field(
        default="label", description="column with a class id, by which images are limited"
    )
    limit_per_class: Annotated[int | None, optional(_count)] = Field(
        default=None, description="first images of each class in file order"
    )
    max_pixels: MaxPixels = Field(
        default=MAX_PIXELS, description="larger images count as bad images"
    )


def _template(value: Any) -> str:
    """Text with one `{}`."""
    text(200).check(value)
    if value.count("{}") != 1 or value.replace("{}", "").count("{"):
        raise refuse(f"must hold one {{}} for the class name, got {shown(value)}")
    return value


class Text(Section):
    """Texts that CLIP's text tower reads for each class; only methods on CLIP look at them."""

    templates: Annotated[
        tuple[Annotated[str, Rule(_template, "text with one {}")], ...],
        listing("texts with one {} for a class name", single=True),
        AfterValidator(no_duplicates),
    ] = Field(
        default=("a photo of a {}.",),
        description="texts around a class name, whose features are averaged; "
        "training uses the first one",
    )
