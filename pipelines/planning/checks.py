"""Checks of a spec against its methods and its backbone, before anything runs."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from graftwork.operators.backbones.resolve import Backbone
from graftwork.operators.errors import ConfigError, IncompatibleError, together
from graftwork.operators.images.augmentation import AUGMENTATIONS
from graftwork.pipelines.spec.model import PipelineSpec
from graftwork.pipelines.spec.scenario import Online

if TYPE_CHECKING:
    from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.shared import Shared


def check_networks(
    spec: PipelineSpec, backbone: Backbone, classes: Sequence[str], methods: Iterable["Method"]
) -> None:
    """Refuses methods that the backbone or the spec lacks something for.

    Raises:
        ConfigError: a method for CLIP on another backbone, or the other way round; no class names;
            no reference.
    """
    for method in methods:
        wanted = method.facts.network
        if wanted == "clip" and backbone.network != "clip":
            raise ConfigError(
                f"{method.name} needs a CLIP with both towers, such as "
                f"open_clip:ViT-B-16-quickgelu, got {backbone.model}",
                key="backbone.model",
            )
        if wanted == "vit" and method.trains and backbone.network == "clip":
            raise ConfigError(
                f"{method.name} trains a timm ViT, got {backbone.model}; "
                "on CLIP run closed-form methods and those for CLIP",
                key="backbone.model",
            )
        if wanted == "clip" and list(classes) == [str(number) for number in range(len(classes))]:
            raise ConfigError(
                f"{method.name} reads the names of the classes; give them", key="dataset.classes"
            )
        if method.facts.contract == "fused" and spec.vit is None:
            raise ConfigError(
                f"{method.name} has a branch on a ViT beside the CLIP; give "
                "vit: {model: vit_base_patch16_224.orig_in21k}, for example",
                key="vit",
            )
        if method.facts.reference and spec.reference is None:
            raise ConfigError(
                f"{method.name} distils on images and texts of no task; give "
                "reference: {images: ..., texts: ...}, or the method distillation: 0",
                key="reference",
            )


def check_trainable(shared: Shared, methods: Iterable["Method"]) -> None:
    """Refuses what a method that trains cannot be given.

    Raises:
        IncompatibleError: the backbone has blocks that the methods' seams do not fit.
        ConfigError: precision, pooling or preprocessing do not suit, or there are too many tasks.
    """
    trained = [method for method in methods if method.trains]
    if not trained:
        return
    spec, backbone = shared.spec, shared.backbone
    name = trained[0].name
    if backbone.refused:
        raise IncompatibleError(
            f"{name} trains on ViTs with timm's standard blocks, not on "
            f"{backbone.model}: {backbone.refused}",
            key="backbone.model",
        )
    if spec.backbone.precision == "fp16":
        raise ConfigError(f"{name} trains in fp32 or bf16, got fp16", key="backbone.precision")
    if spec.features.pooling != backbone.natural_pooling:
        raise ConfigError(
            f"{name} reads the backbone's own pooling, "
            f"{backbone.natural_pooling}, got {spec.features.pooling}",
            key="features.pooling",
        )
    _check_crop(shared, trained)


def check_room(methods: Iterable["Method"], count: int) -> None:
    """Refuses a stream of more tasks than a method has room for.

    Args:
        methods: trained ones.
        count: the number of tasks.

    Raises:
        ConfigError: one problem for each such method.
    """
    problems = []
    for method in methods:
        for part in (method, *method.branches.values()):
            room = part.needs.room
            if room is None or room.tasks >= count:
                continue
            fits = f"{room.tasks} task" + ("" if room.tasks == 1 else "s")
            what = f"room for {fits}, the stream has {count}; give at least {room.per_task * count}"
            problems.append(ConfigError(what, key=f"{method.key}.{room.field}"))
    if problems:
        raise together(problems)


def check_transfer(methods: Sequence["Method"]) -> None:
    """Refuses to ask about later tasks where nobody has an answer.

    Raises:
        ConfigError: no method scores classes by their names alone.
    """
    if not any(method.facts.zero_shot for method in methods):
        raise ConfigError(
            "no method here knows a class before it was trained; zs_clip and zscl do",
            key="transfer",
        )


def check_online(spec: PipelineSpec, online: Online, methods: Sequence["Method"]) -> None:
    """Refuses what a single pass over an online stream leaves no sense.

    Args:
        online: how the stream is passed over.
        methods: those of the spec, in its order.

    Raises:
        ConfigError: one problem for each hyper-parameter that would not be read, and for each
            method that a single pass does not train.
    """
    problems = []
    for (_, given), method in zip(spec.methods, methods, strict=True):
        if not method.trains or method.facts.upper_bound:
            continue
        problems += [
            ConfigError(
                f"not read: an online stream passes once over its images, {instead}; remove it",
                key=f"{method.key}.{field}",
            )
            for field, instead in (
                ("epochs", "with scenario.online.times steps on each batch"),
                ("batch_size", "in batches of scenario.online.batch_size"),
            )
            if field in given
        ]
        if online.mask == "batch" and method.facts.contract == "fused":
            problems.append(
                ConfigError(
                    f"{method.name} learns weights of classes in the place of a mask; set method",
                    key="scenario.online.mask",
                )
            )
        if (passes := method.needs.passes) is not None:
            problems.append(
                ConfigError(
                    f"{method.name} trains all of itself from pass {passes.count + 1} on, an "
                    f"online stream has one; set {passes.field}: 0",
                    key=method.key,
                )
            )
    if problems:
        raise together(problems)


def _check_crop(shared: Shared, trained: Sequence["Method"]) -> None:
    for method in trained:
        name = method.training.augmentation
        value = AUGMENTATIONS[name]
        if value != AUGMENTATIONS["none"] and shared.preprocessing.crop is None:
            raise ConfigError(
                f"augmentation {name} of {method.name} needs a crop size; set preprocessing.crop",
                key="backbone.preprocessing",
            )
