"""Parameters and hints as JSON: what is written is read back, and nothing else is."""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import pytest

from graftwork.cluster.execution.graph import walk
from graftwork.operators import catalogue, parameters
from graftwork.operators.images.augmentation import AUGMENTATIONS
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.keys import canonical
from graftwork.operators.parameters import combining, features, fitting, hints, training
from graftwork.operators.parameters.as_json import INLINE, OPTIONAL, from_json, named, to_json
from graftwork.operators.parameters.learners import LearnerRef, MethodRef, Network, Numerics
from graftwork.operators.parameters.predictors import (
    EnsemblePart,
    FittedPart,
    FusedPart,
    GraftPart,
    TrainedPart,
)
from graftwork.operators.parameters.tasks import Columns, TaskData
from graftwork.operators.stage import OPERATORS, Stage
from graftwork.operators.store import Store
from graftwork.operators.streams.stream import described
from graftwork.pipelines.planning.expand import make_runs
from graftwork.pipelines.planning.methods import method_of
from graftwork.pipelines.planning.runs import Run
from graftwork.pipelines.planning.shared import Shared
from tests import pngs

KINDS: Mapping[str, tuple[type[Any], type[Any]]] = {
    "dataset": (features.DatasetParameters, hints.SourceHints),
    "features": (features.ShardParameters, hints.ShardHints),
    "exemplars": (features.RankParameters, hints.CpuHints),
    "text": (features.TextParameters, hints.NetworkHints),
    "fit": (fitting.FitParameters, hints.FitHints),
    "train": (training.TrainParameters, hints.TrainHints),
    "join": (training.JoinParameters, hints.ImageHints),
    "predict": (training.PredictParameters, hints.ImageHints),
    "score": (training.ScoreParameters, hints.TrainHints),
    "blend": (training.BlendParameters, hints.CpuHints),
    "statistics": (combining.StatisticsParameters, hints.ImageHints),
    "merge": (combining.MergeParameters, hints.NetworkHints),
    "ensemble": (combining.EnsembleParameters, hints.CpuHints),
    "evaluate": (fitting.EvaluateParameters, hints.EvaluateHints),
}
"""Operator -> what its key and its hints hold."""

METHOD = MethodRef(name="finetune", version=2, hyperparameters={"epochs": 3, "lr": 0.5})
TASK = TaskData(rows="0a", classes=(1, 3))
TESTED = TaskData(rows="0b", classes=(0, 2), seen=4)
COLUMNS = Columns(index=1, count=2, current=(2, 3), before=2, seen=4)
NUMERICS = Numerics(device="cpu", precision="fp32", torch="2.9", compile=False)
NETWORK = Network(architecture="vit", fingerprint="ab")
STEPS = Preprocessing(resize=18, crop=16, mean=(0.5, 0.4, 0.3))
LEARNER = LearnerRef(
    method=METHOD,
    seed=7,
    task=COLUMNS,
    network=NETWORK,
    preprocessing=STEPS,
)
GRAFT = features.Graft(method=METHOD, task=COLUMNS, seed=7)
FROZEN = features.FeatureKind(
    network=NETWORK, preprocessing=STEPS, pooling="token", dtype="float16", numerics=NUMERICS
)
ADAPTED = replace(FROZEN, graft=GRAFT)
HERDING = features.Ranking(selection="herding", features=FROZEN)
DRAWN = features.Ranking(selection="random", seed=7)
MEMORY = training.Memory(
    earlier=(TASK,), exemplars=9, budget="per_class", ranking=DRAWN, order="0c"
)
DATA = training.TrainingData(task=TASK, memory=MEMORY, query=FROZEN, reference=("a river",))
TEXTS = features.TextKind(network=NETWORK, templates=("{}",), open_clip="3", numerics=NUMERICS)
NUMBERING = hints.Numbering(classes=(1, -1, 0), domains=(0,))
PART = hints.PartHints(source=0, rows="eJw=")
CHOSEN = hints.Selection(sources=(NUMBERING,), tasks=((PART, PART), ()), shards=((0, 4), (0, 8)))
PLACE = hints.NetworkPlace(model="vit.x", weights="/w", pooling="token", image_size=None)
READING = hints.ImageHints(
    network=PLACE,
    cpus=1.0,
    max_pixels=None,
    images=4,
    places={"kind": "files", "files": ["/a"]},
    selection=CHOSEN,
)
TRAINED = TrainedPart(
    method=METHOD, seed=7, task=COLUMNS, learned=(5, 0, 3, 1), state="a.safetensors"
)

VALUES: list[Any] = [
    METHOD,
    TASK,
    TESTED,
    COLUMNS,
    Columns(index=0, current=(0,), before=0, seen=1, names=("cat",), templates=("{}",)),
    MEMORY,
    NETWORK,
    NUMERICS,
    Numerics(device="cuda", precision="bf16", torch="2.9"),
    LEARNER,
    DATA,
    training.TrainingData(task=TASK),
    training.TrainParameters(
        learner=LEARNER, data=DATA, augmentation=AUGMENTATIONS["slca"], numerics=NUMERICS
    ),
    training.TrainParameters(
        learner=LEARNER, data=DATA, augmentation=AUGMENTATIONS["none"], numerics=NUMERICS
    ),
    training.JoinParameters(learner=LEARNER, data=DATA, numerics=NUMERICS),
    training.ScoreParameters(learner=LEARNER, data=DATA, numerics=NUMERICS),
    training.PredictParameters(
        learner=LEARNER, numerics=NUMERICS, tasks=(TESTED, TESTED), after=(0, 1), vote_batch=None
    ),
    training.PredictParameters(
        learner=LEARNER, numerics=NUMERICS, query=FROZEN, tasks=(TESTED,), after=(0,), vote_batch=8
    ),
    training.BlendParameters(method=METHOD, tasks=(TESTED,), after=(0,)),
    features.DatasetParameters(digest="cd", classes=6, domains=("", "x")),
    GRAFT,
    FROZEN,
    ADAPTED,
    features.ShardParameters(kind=FROZEN, digest="ef"),
    features.ShardParameters(kind=ADAPTED, digest="ef"),
    HERDING,
    DRAWN,
    features.RankParameters(ranking=HERDING, digest="ef"),
    features.RankParameters(ranking=DRAWN, digest="ef"),
    TEXTS,
    features.TextParameters(kind=TEXTS, names=("cat",)),
    fitting.FitParameters(
        method=METHOD,
        seed=None,
        features=(FROZEN, ADAPTED),
        texts=features.TextParameters(kind=TEXTS, names=("cat",)),
        tasks=(TASK,),
    ),
    fitting.FitParameters(method=METHOD, seed=7, features=(FROZEN,), tasks=(TASK, TASK)),
    fitting.EvaluateParameters(method=METHOD, order=[1, 0], seed=7, tasks=(TESTED,)),
    fitting.EvaluateParameters(
        method=METHOD, columns=(1, 0), order="natural", seed=7, tasks=(TESTED,)
    ),
    fitting.Group(name="base", classes=(0, 1)),
    fitting.Measures(groups=(fitting.Group(name="many", classes=(2,)),), online=True),
    fitting.EvaluateParameters(
        method=METHOD,
        order=7,
        seed=7,
        tasks=(TESTED,),
        measures=fitting.Measures(online=True, transfer=True),
    ),
    training.SinglePass(batch_size=64, times=3),
    combining.StatisticsKind(kind="fisher", labels="ground_truth"),
    combining.StatisticsParameters(
        learner=LEARNER,
        task=TASK,
        limit=8,
        shard=(4, 8),
        statistics=combining.StatisticsKind(kind="gram"),
        numerics=NUMERICS,
    ),
    combining.StatisticsParameters(
        learner=LEARNER,
        task=TASK,
        query=FROZEN,
        limit=8,
        shard=(0, 4),
        statistics=combining.StatisticsKind(kind="fisher", labels="model_sample"),
        numerics=NUMERICS,
    ),
    combining.MergeParameters(
        learner=LEARNER, start=COLUMNS, merge=METHOD, head="newest", over="tasks"
    ),
    combining.Member(method=METHOD, columns=(1, 0), seed=7),
    combining.EnsembleParameters(
        rule=METHOD, members=(combining.Member(method=METHOD, seed=7),), tasks=(TESTED,)
    ),
    NUMBERING,
    PART,
    CHOSEN,
    hints.CpuHints(cpus=0.5),
    hints.EvaluateHints(cpus=1, beginnings=("ab",), selection=CHOSEN),
    hints.CpuHints(cpus=1, selection=CHOSEN),
    hints.FitHints(cpus=1, num_classes=6, ids=(4, 2), selection=CHOSEN),
    PLACE,
    hints.NetworkHints(network=PLACE, cpus=2),
    READING,
    hints.TrainHints(reading=READING, tasks=2, checkpoint_minutes=0, reference={"kind": "files"}),
    hints.ShardHints(reading=READING, batch_size=None),
    hints.SourceHints(source={"builtin": "digits"}, split="train"),
    GraftPart(method=METHOD, task=COLUMNS, seed=7, state="b.safetensors"),
    FittedPart(
        method=METHOD,
        seed=0,
        state="s",
        learned=(1, 0),
        graft=GraftPart(method=METHOD, task=COLUMNS, seed=7, state="b.safetensors"),
        keeps_frozen=True,
    ),
    TRAINED,
    FusedPart(method=METHOD, learned=(1, 0), state="s", clip=TRAINED, vit=TRAINED),
    EnsemblePart(rule=METHOD, learned=(0, 1), members=(to_json(TRAINED),)),
]


def named_by(value: Any) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", VALUES, ids=named_by)
def test_what_is_written_is_read_back(value: Any) -> None:
    written = to_json(value)
    # Tuples are written as lists, so that JSON has nothing to change.
    assert json.loads(json.dumps(written)) == written
    assert from_json(type(value), written) == value


@pytest.mark.parametrize("value", VALUES, ids=named_by)
def test_a_key_that_is_missing_or_unknown_is_named(value: Any) -> None:
    kind, written = type(value), to_json(value)
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: unknown key 'anohter'$"):
        from_json(kind, {**written, "anohter": 1})
    for key in written:
        left = {name: held for name, held in written.items() if name != key}
        try:
            other = from_json(kind, left)
        except ValueError as error:
            assert repr(key) in str(error)
        else:
            # What may be left out is written nowhere else.
            assert to_json(other) == left


def classes() -> Iterator[type[Any]]:
    """Every dataclass of the package."""
    for module in pkgutil.iter_modules(parameters.__path__):
        held = importlib.import_module(f"{parameters.__name__}.{module.name}")
        for name, value in vars(held).items():
            own = getattr(value, "__module__", "") == held.__name__
            if own and is_dataclass(value) and not name.startswith("_"):
                assert isinstance(value, type)
                yield value


def test_every_class_is_among_the_values() -> None:
    assert set(classes()) == {type(value) for value in VALUES}


# --- the rules --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    length: int
    note: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Outer:
    digest: str = field(metadata=named("images"))
    inner: Inner = field(metadata=INLINE)
    held: Inner | None
    parts: tuple[Inner, ...]
    share: float
    sure: bool


OUTER: dict[str, Any] = {
    "images": "ab", "length": 3, "held": None, "parts": [{"length": 1}], "share": 1, "sure": True,
}  # fmt: skip


def test_names_inline_fields_and_what_is_left_out() -> None:
    value = Outer(
        digest="ab",
        inner=Inner(length=3),
        held=None,
        parts=(Inner(length=1),),
        share=1,
        sure=True,
    )
    assert to_json(value) == OUTER
    assert from_json(Outer, OUTER) == value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parts": "ab"}, "Outer: 'parts' must be a list, got 'ab'"),
        ({"parts": [{"length": 1, "depth": 2}]}, "Inner: unknown key 'depth'"),
        ({"parts": [{}]}, "Inner: missing key 'length'"),
        ({"parts": [3]}, "Inner: must be a mapping, got 3"),
        ({"length": "3"}, "Inner: 'length' must be an integer, got '3'"),
        ({"length": True}, "Inner: 'length' must be an integer, got True"),
        ({"length": None}, "Inner: 'length' must be an integer, got None"),
        ({"share": "1"}, "Outer: 'share' must be a number, got '1'"),
        ({"sure": 1}, "Outer: 'sure' must be true or false, got 1"),
        ({"images": 5}, "Outer: 'images' must be a text, got 5"),
        ({"digest": "ab"}, "Outer: unknown key 'digest'"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_json(Outer, OUTER | changes)
    assert str(caught.value) == says


# --- plans ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Runs that hold every operator; a plan of methods on CLIP does not look at the network."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    folder = pngs.data(tmp_path_factory.mktemp("data"), pngs.rows(2, 0), pngs.rows(1, 5000))
    epochs = {"epochs": 1, "batch_size": 4}
    methods = [
        "simplecil",
        {"finetune": {**epochs}},
        {"joint": {**epochs}},
        {"ranpac": {"projection_dim": 8, "first_session": "adapter", "augmentation": "none"}},
        {"l2p": {**epochs, "augmentation": "none"}},
        {"magmax_independent": {**epochs}},
    ]
    merge = [{"fisher": {"of": "finetune", "images": 3}}, {"ties": {"of": "magmax_independent"}}]
    ensemble = [{"mean_prob": {"of": ["simplecil", "finetune"]}}]
    made = pngs.plan(store, folder, methods=methods, merge=merge, ensemble=ensemble)
    shared = Shared(
        spec=made.spec,
        data=made.data,
        backbone=made.backbone,
        preprocessing=made.preprocessing,
    )
    given = {
        "zs_clip": {},
        "proof": {"exemplars": 12},
        "promptfusion": {"exemplars": 12, "exemplar_selection": "random"},
    }
    on_clip = [
        method_of(name, name, catalogue.method(name, values)[0]) for name, values in given.items()
    ]
    return [*made.runs, *make_runs(shared, on_clip, beside=shared)]


def stages(runs: list[Run]) -> tuple[Stage, ...]:
    return walk([run.evaluate for run in runs])


def test_every_stage_of_a_plan_survives(runs: list[Run]) -> None:
    seen = set()
    for stage in stages(runs):
        seen.add(stage.operator)
        for kind, given in zip(KINDS[stage.operator], (stage.parameters, stage.hints), strict=True):
            written = to_json(from_json(kind, given))
            assert canonical(written) == canonical(dict(given))
    # Other tests of this process register operators of their own.
    own = {name for name, found in OPERATORS.items() if found.function.startswith("graftwork.")}
    assert seen == KINDS.keys() == own


def test_what_a_run_holds_is_what_its_stages_say(runs: list[Run]) -> None:
    for run in runs:
        assert to_json(run.evaluated) == run.evaluate.parameters
        for model in run.models:
            given = model.stage.parameters
            assert pngs.learner_of(model.stage) == model.learner
            assert given["images"] == to_json(model.data.task) == to_json(described(model.rows))
    assert sum(bool(run.models) for run in runs) == 5


def test_a_stage_of_several_names_its_group(runs: list[Run]) -> None:
    groups: dict[str, set[str]] = {}
    for stage in stages(runs):
        assert stage.label.startswith(stage.group)
        rest = stage.label.removeprefix(stage.group)
        # Shards of features are counted, exemplars go by their images, all else by the task.
        several = {"features": r" \d+/\d+", "exemplars": r" [0-9a-f]{8}"}
        pattern = several.get(stage.operator, r" task \d+.*")
        assert not stage.group or re.fullmatch(pattern, rest), stage.label
        groups.setdefault(stage.operator, set()).add(stage.group)
    alone = {operator for operator, names in groups.items() if names == {""}}
    assert alone == {"dataset", "text", "fit", "ensemble", "evaluate"}
    assert groups["exemplars"] == {"exemplars herding", "exemplars random seed 0"}
    assert {"features train", "adapted features test"} <= groups["features"]
