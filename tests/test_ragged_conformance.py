"""Ragged streams are normal: every method, merge and rule on each shape of `tests/shapes.py`.

Laws that hold for all of them, and what only some of them owe.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from graftwork.methods import METHODS
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Learner
from graftwork.methods.contracts.trained import learned as learned_of
from graftwork.operators import building, ensembling, merging
from graftwork.operators.backbones import loading
from graftwork.operators.errors import BadDataError
from graftwork.operators.formats import predictions, selection, states
from graftwork.operators.formats.texts import load as load_texts
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import EvaluateHints, FitHints
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.stage import Stage
from graftwork.operators.stages.merge import STATISTICS
from graftwork.operators.store import Store
from graftwork.operators.training import loop
from graftwork.operators.training.settings import Settings
from graftwork.pipelines.planning.runs import Run
from tests import by_hand, pngs, shapes
from tests.by_hand import Learned, Prediction
from tests.shapes import CASES, SHAPES, Case, Computed, Network
from tests.test_merging import merge_states

Compute = Callable[[str, Network], Computed]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Compute:
    """All results of a shape on a network, computed once."""

    @cache
    def compute(name: str, network: Network) -> Computed:
        return shapes.computed(name, network, tmp_path_factory.mktemp("shape"))

    return compute


def each(cases: list[Case], names: list[str] | None = None) -> Any:
    """Runs a test on every shape with every case: `[one class in a task-finetune]`."""
    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}-{case.label}")
            for name in names or SHAPES
            for case in cases
        ],
    )


FITTED = [case for case in CASES if case.label in by_hand.FITTED]
CLOSED = [case for case in CASES if case in FITTED or case.label.startswith("aper_")]
MERGES = [case for case in CASES if case.label.endswith(" merge")]
RULES = [case for case in CASES if case.label.endswith(" ensemble")]


def run_of(done: Computed, case: Case) -> tuple[Run, predictions.Table]:
    run = done.run(case.label)
    return run, predictions.read(done.store, "evaluate", run.evaluate.key)


def own(run: Run, *operators: str) -> list[Stage]:
    return [stage for stage in run.own if stage.operator in operators]


def scores_after(done: Computed, run: Run, task: int) -> Tensor | None:
    """What a trained, merged or fused method kept of its scores; None for others."""
    kept = own(run, "blend") or own(run, "predict")
    if not kept:
        return None
    stage = kept[task if len(kept) > 1 else 0]
    return load_tensors(done.store.read(stage.operator, stage.key, "scores.safetensors"))["scores"]


def state_of(done: Computed, stage: Stage) -> dict[str, Tensor]:
    return load_tensors(done.store.read(stage.operator, stage.key, "state.safetensors"))


def rows_of(done: Computed, stage: Stage, hints: Any) -> tuple[list[selection.Chosen], Any]:
    """Rows of each task that a stage reads, and their features by task."""
    work = stage.assignment()
    given = from_json(hints, work.hints).selection
    tasks = selection.rows_of(work, done.store, given)
    return tasks, [selection.matrix(work, done.store, given, task) for task in tasks]


# The label space, and what is counted.


@each(CASES)
def test_what_is_predicted_are_the_classes_trained_so_far(
    name: str, case: Case, results: Compute
) -> None:
    done = results(name, case.network)
    run, table = run_of(done, case)
    shape = done.shape
    assert run.stream.classes == tuple(shapes.NAMES[label] for label in shape.arrival)
    assert [task.seen for task in run.stream.tasks] == list(shape.seen)
    for task, seen in enumerate(shape.seen):
        after = table["task_trained"] == task
        wanted = [pair for pair in shape.tested() if pair[0] <= task]
        found = zip(table["true_task"][after].tolist(), table["label"][after].tolist(), strict=True)
        assert list(found) == wanted
        assert set(table["predicted"][after].tolist()) <= set(range(seen))
        kept = scores_after(done, run, task)
        if kept is not None:
            scores = kept[: len(wanted), :seen]
            # A method that trains on all tasks at once predicts once, for all of them.
            columns = seen if len(own(run, "predict")) > 1 else shape.seen[-1]
            assert (len(scores), kept.shape[1]) == (len(wanted), columns)
            assert bool(scores.isfinite().all())
            assert table["predicted"][after].tolist() == scores.argmax(dim=1).tolist()
    assert len(table["label"]) == sum(
        sum(task <= after for task, _ in shape.tested()) for after in shape.tasks
    )


@each(CASES)
def test_metrics_are_what_is_counted_by_hand(name: str, case: Case, results: Compute) -> None:
    done = results(name, case.network)
    run, table = run_of(done, case)
    facts = json.loads(done.store.read("evaluate", run.evaluate.key, "summary.json"))
    names = ("task_trained", "true_task", "label", "predicted")
    rows = [Prediction(*values) for values in zip(*(table[n].tolist() for n in names), strict=True)]
    tasks, classes = len(done.shape.train), done.shape.seen[-1]
    near = lambda value: pytest.approx(value, abs=1e-9)  # noqa: E731
    micro = [by_hand.percent([r for r in rows if r.trained == task]) for task in range(tasks)]
    assert facts["curve"] == near(micro)
    assert facts["a_avg"] == near(sum(micro) / tasks)
    cells = by_hand.matrix(rows, tasks)
    assert facts["matrix"] == [near(row) for row in cells]
    macro = []
    for task in range(tasks):
        tested = [v for v in by_hand.classes_after(rows, task, classes) if v is not None]
        macro.append(sum(tested) / len(tested))
    assert facts["curve_macro_class"] == near(macro)
    last = by_hand.classes_after(rows, tasks - 1, classes)
    assert facts["per_class"] == [None if value is None else near(value) for value in last]
    assert last.count(None) == (2 if name == "a class without test images" else 0)
    columns = [[cells[i][j] for i in range(j, tasks)] for j in range(tasks - 1)]
    assert facts["forgetting"] == near(sum(max(c) - c[-1] for c in columns) / len(columns))
    assert facts["bwt"] == near(sum(c[-1] - c[0] for c in columns) / len(columns))


@each([case for case in CASES if not case.label.endswith(("merge", "ensemble"))])
def test_no_training_image_is_left_out(name: str, case: Case, results: Compute) -> None:
    done = results(name, case.network)
    run, shape = done.run(case.label), done.shape
    assert [dict(count(task.train.index.labels)) for task in run.stream.tasks] == [
        shape.trained(task) for task in shape.tasks
    ]
    for stage in own(run, "train", "join"):
        rows, at = pngs.training_rows(stage, done.store), stage.parameters["task"]["index"]
        new = rows.targets[~rows.exemplars]
        wanted = [shape.trained(at)]
        if case.label == "joint":
            wanted = [shape.trained(task) for task in shape.tasks]
        total = {c: sum(part.get(c, 0) for part in wanted) for part in wanted for c in part}
        assert dict(count(new)) == total
        kept = count(rows.targets[rows.exemplars])
        earlier = {c for task in range(at) for c in shape.trained(task)}
        assert kept.keys() <= earlier
        assert all(number <= max(1, 6 // len(earlier)) for number in kept.values())


def count(columns: Any) -> dict[int, int]:
    found, times = np.unique(np.asarray(columns), return_counts=True)
    return dict(zip(found.tolist(), times.tolist(), strict=True))


# Closed-form methods.


def learned(done: Computed, run: Run) -> list[Learned]:
    """What a fitted method may know after each task, its rows read from the features."""
    assert run.model is not None
    tasks, features = rows_of(done, run.model, FitHints)
    columns = [task.index.labels for task in tasks]
    if len(tasks) == 1 and len(done.shape.train) > 1:
        return _of_one_fit(done, run, tasks[0], features[0])
    found = []
    for last, seen in enumerate(done.shape.seen):
        every = slice(0, last + 1)
        found.append(
            Learned(
                features=np.concatenate(features[every]).astype(np.float64),
                columns=np.concatenate(columns[every]),
                samples=np.concatenate([task.index.sample_ids() for task in tasks[every]]),
                newest=np.concatenate(
                    [
                        np.full(len(part), number == last)
                        for number, part in enumerate(columns[every])
                    ]
                ),
                classes=seen,
            )
        )
    return found


def _of_one_fit(done: Computed, run: Run, rows: selection.Chosen, features: Any) -> list[Learned]:
    """Of a fit on all rows of a data set, which serves all class orders: what a stream learned."""
    place = {row: column for column, row in enumerate(rows_of_classes(done, run))}
    columns = np.array([place.get(label, -1) for label in rows.index.labels.tolist()])
    return [
        Learned(
            features=features[own].astype(np.float64),
            columns=columns[own],
            samples=rows.index.sample_ids()[own],
            newest=np.ones(int(own.sum()), dtype=bool),
            classes=seen,
        )
        for seen in done.shape.seen
        for own in [(columns >= 0) & (columns < seen)]
    ]


def rows_of_classes(done: Computed, run: Run) -> list[int]:
    """Where the classes of a stream stand in such a fit: it has those with training images."""
    known = np.unique(done.plan.data.sources[0].train.labels).tolist()
    return [known.index(label) for label in run.stream.ids]


@each(CLOSED)
def test_a_closed_form_method_is_its_formula(name: str, case: Case, results: Compute) -> None:
    done = results(name, case.network)
    run, table = run_of(done, case)
    formula = by_hand.FITTED.get(case.label, by_hand.simplecil)
    features = rows_of(done, run.evaluate, EvaluateHints)[1]
    assert run.model is not None
    found = states.load_states(done.store, "fit", run.model.key)
    method = building.fitted(from_json(MethodRef, run.model.parameters["method"]))
    for task, known in enumerate(learned(done, run)):
        assert count(known.columns[known.newest]) == done.shape.trained(task) or len(found) == 1
        rows = np.concatenate(features[: task + 1]).astype(np.float64)
        expected = formula(known, rows)
        state = found[task if len(found) > 1 else 0]
        scores = method.logits(state, torch.from_numpy(rows).float(), 0).double().numpy()
        if len(found) == 1 and len(done.shape.train) > 1:
            scores = scores[:, rows_of_classes(done, run)[: known.classes]]
        if case.label == "slda":
            scores = scores - scores[:, :1]
        assert scores.shape == expected.shape
        size = np.abs(expected).max()
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * size)
        ordered = np.sort(expected, axis=1)
        sure = np.ones(len(rows), dtype=bool)
        if known.classes > 1:
            sure = ordered[:, -1] - ordered[:, -2] > 1e-3 * size
        after = table["task_trained"] == task
        assert table["predicted"][after][sure].tolist() == expected.argmax(axis=1)[sure].tolist()
        # Colours are far apart.
        assert sure.mean() > 0.5


@each([case for case in CASES if case.label == "zs_clip"])
def test_zero_shot_scores_are_cosines_to_the_texts_of_the_classes_so_far(
    name: str, case: Case, results: Compute
) -> None:
    done = results(name, case.network)
    [stage] = [stage for stage in done.plan.stages if stage.operator == "text"]
    texts, names = load_texts(done.store, stage.operator, stage.key)
    means = by_hand.unit(np.mean([by_hand.unit(one) for one in texts.double().numpy()], axis=0))
    wanted = [names.index(shapes.NAMES[label]) for label in done.shape.arrival]
    features = rows_of(done, done.run(case.label).evaluate, EvaluateHints)[1]
    for task, seen in enumerate(done.shape.seen):
        rows = by_hand.unit(np.concatenate(features[: task + 1]).astype(np.float64))
        scores = member_scores(done, case.label, task)
        np.testing.assert_allclose(scores, rows @ means[wanted[:seen]].T, rtol=1e-4, atol=1e-5)


@each(CLOSED)
def test_plain_colours_are_told_apart_in_closed_form(
    name: str, case: Case, results: Compute
) -> None:
    table = run_of(results(name, case.network), case)[1]
    right = table["predicted"] == table["label"]
    if name == "equal images":
        # Of three tested images with the same bytes two have a class of their own.
        right = right[~np.isin(table["sample"], (0, 2, 4, 7))]
    assert right.all()


# Trained methods.

HEAD = ("head.weight", "head.bias")
GAUSSIANS = ("count", "mean", "covariance", "task_of")
OF_CLASSES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("vpt_shallow", "vpt_deep", "lora", "bitfit", "lae", "magmax"), HEAD),
    **dict.fromkeys(("l2p", "dualprompt", "coda_prompt", "dap"), HEAD),
    **dict.fromkeys(("slca", "coma", "cofima"), (*HEAD, *GAUSSIANS)),
    "ease": ("spaces.0.count", "spaces.1.count"),
    "proof": ("fusion.counts", "fusion.prototypes"),
}
"""Tensors with a row for each class, which stays where a task has no image of the class."""
MIXTURES = tuple(f"{p}.{n}" for p in ("plain", "prompted") for n in ("count", "mean", "spread"))
OF_TASKS: dict[str, tuple[str, ...]] = {
    "l2p": ("selected",),
    "dualprompt": ("e", "key"),
    "coda_prompt": ("components", "keys", "masks"),
    "dap": ("embeddings", "keys", "classes"),
    "s_prompts": ("prompts", "weight", "bias", "rows", "centres"),
    "hide_prompt": ("e", "entries", *MIXTURES),
    "ease": ("spaces.0.adapters.", "spaces.1.adapters."),
    "esn": ("prompt", "heads.", "temperatures", "stages.0.", "stages.1."),
    "magmax_independent": ("heads.",),
    "proof": ("fusion.images.0.", "fusion.images.1.", "fusion.context.0", "fusion.context.1"),
}
"""Beginnings of names of tensors whose rows are of tasks, and stay once the task is over."""
NOTHING_KEPT = ("finetune", "joint", "coop", "zscl", "promptfusion")
"""All that these train goes on to change, or there is no second task."""
TRAINED = [case for case in CASES if case.label in OF_CLASSES or case.label in OF_TASKS]


def test_every_method_is_in_a_table() -> None:
    closed = {case.label for case in CLOSED} | {"zs_clip"}
    trained = {*OF_CLASSES, *OF_TASKS, *NOTHING_KEPT}
    combined = {case.label for case in (*MERGES, *RULES)}
    assert closed | trained | combined == {case.label for case in CASES}
    assert closed | trained == set(METHODS)


@each(TRAINED)
def test_what_belongs_to_classes_and_tasks_of_before_stays(
    name: str, case: Case, results: Compute
) -> None:
    done = results(name, case.network)
    run = done.run(case.label)
    stages = own(run, "join") or own(run, "train")
    found = [state_of(done, stage) for stage in stages]
    assert len(found) == len(done.shape.train)
    for task in done.shape.tasks[1:]:
        before, after = found[task - 1], found[task]
        rest = sorted(set(range(done.shape.seen[task - 1])) - done.shape.trained(task).keys())
        names = [n for n in OF_CLASSES.get(case.label, ()) if n in before]
        assert names or case.label not in OF_CLASSES
        for tensor in names:
            assert torch.equal(after[tensor][rest], before[tensor][rest]), tensor
            assert len(after[tensor]) == done.shape.seen[task]
        starts = OF_TASKS.get(case.label, ())
        kept = [n for n in before if n.startswith(starts)] if starts else []
        assert bool(kept) == bool(starts)
        for tensor in kept:
            assert torch.equal(after[tensor][: len(before[tensor])], before[tensor]), tensor


def at_work(
    done: Computed, stage: Stage, before: State | None
) -> tuple[Learner, dict[str, Tensor]]:
    """The learner of a training about to take a step on all images, and the terms of its loss."""
    backbone = done.plan.backbone
    network = loading.load(backbone.model, backbone.weights, backbone.pooling)
    method = building.trained(pngs.learner_of(stage).method)
    settings, task = Settings(seed=0), pngs.task_of(stage)
    learner, _ = loop.open_learner(method, network, task, before, settings)  # type: ignore[arg-type]
    learner.eval().begin()
    rows = pngs.training_rows(stage, done.store)
    every = list(range(len(rows.targets)))
    pixels = rows.normalise(rows.batch(every, 0, "none"))
    learner.train()
    return learner, learner(pixels, rows.targets, rows.query)


@each(
    [case for case in TRAINED if HEAD[0] in OF_CLASSES.get(case.label, ())],
    ["one class in a task", "tasks of 3, 1 and 4 classes", "a domain without a class"],
)
def test_a_loss_reaches_the_columns_of_the_task_alone(
    name: str, case: Case, results: Compute
) -> None:
    done = results(name, case.network)
    stages, before = own(done.run(case.label), "train"), None
    for task, stage in enumerate(stages):
        learner, terms = at_work(done, stage, before)
        assert all(bool(term.isfinite()) for term in terms.values())
        terms["loss"].backward()
        current = sorted(done.shape.trained(task))
        for tensor in HEAD:
            gradient = learner.get_parameter(tensor).grad
            assert gradient is not None
            reached = gradient.flatten(1).any(dim=1) if gradient.ndim > 1 else gradient != 0
            # Of a single class everything is certain: there is nothing to learn.
            wanted = current if len(current) > 1 else []
            assert reached.nonzero().flatten().tolist() == wanted
        before = state_of(done, stage)


LEARNED = ("finetune", "vpt_shallow", "vpt_deep", "dualprompt", "lora", "joint", "ease", "dap")
LEARNED += ("coda_prompt", "s_prompts", "hide_prompt", "bitfit", "lae", "promptfusion")
KEPT = ("joint", "ease", "s_prompts", "promptfusion")


@each([c for c in CASES if c.label in LEARNED], ["tasks of 3, 1 and 4 classes"])
def test_four_classes_after_a_single_one_are_learned(
    name: str, case: Case, results: Compute
) -> None:
    """Chance is 1 in 4, and 1 in 8 among all classes."""
    table = run_of(results(name, case.network), case)[1]
    last = table["task_trained"] == 2
    new = last & (table["true_task"] == 2)
    assert new.sum() == 8
    assert (table["predicted_in_task"] == table["label"])[new].mean() >= 0.75
    if case.label in KEPT:
        assert (table["predicted"] == table["label"])[last].mean() >= 0.8


# Merges.


def start_of(done: Computed, stage: Stage) -> State:
    """The state before the training of a stage."""
    backbone = done.plan.backbone
    network = loading.load(backbone.model, backbone.weights, backbone.pooling)
    method = building.trained(pngs.learner_of(stage).method)
    opened = loop.open_learner(method, network, pngs.task_of(stage), None, Settings(seed=0))  # type: ignore[arg-type]
    return learned_of(*opened)


@each(MERGES)
def test_a_merge_has_rows_for_all_classes_so_far(name: str, case: Case, results: Compute) -> None:
    done = results(name, case.network)
    merge = merging.build(case.label.removesuffix(" merge"), {})
    stages = own(done.run(shapes.MERGED), "train")
    models = [state_of(done, stage) for stage in stages]
    merged = [state_of(done, s) for s in own(done.run(case.label), "merge")]
    assert len(merged) == len(done.shape.train)
    for task, (state, newest) in enumerate(zip(merged, models, strict=True)):
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in newest.items()}
        assert all(bool(t.isfinite().all()) for t in state.values())
        assert len(state["head.weight"]) == done.shape.seen[task]
        if task == 0 and not merge.card.base:
            # A single model is what it was.
            assert all(torch.equal(state[n], t) for n, t in newest.items())
        if task and merge.card.most != 1:
            # What the older models have no row of is the newest one's.
            for tensor in HEAD:
                new = slice(done.shape.seen[task - 1], None)
                assert torch.equal(state[tensor][new], newest[tensor][new]), tensor
            # Of a single class all is certain: a model that knows no other has no information.
            ignored = case.label == "fisher merge" and done.shape.seen[task - 1] == 1
            # A start without rows of later classes would scale those of the first task alone.
            lacks = merge.card.base and done.shape.seen[task] > done.shape.seen[0]
            same = torch.equal(state["head.weight"], newest["head.weight"])
            assert same == (ignored or lacks)
    if case.label == "wise_ft merge":
        # The start of the newest model, with rows for all classes so far.
        for stage, state, newest in zip(stages, merged, models, strict=True):
            for tensor, start in start_of(done, stage).items():
                wanted = start + 0.5 * (newest[tensor] - start)
                torch.testing.assert_close(state[tensor], wanted, rtol=0, atol=1e-6)
    if case.label == "mean merge":
        shared = [model["head.weight"][: done.shape.seen[0]] for model in models]
        wanted = torch.stack(shared).mean(dim=0)
        torch.testing.assert_close(merged[-1]["head.weight"][: len(wanted)], wanted)


WHOLE: dict[str, dict[str, Any]] = {
    "wise_ft": {"alpha": 1.0},
    "task_arithmetic": {"scale": 1.0, "combine": "mean"},
    "magmax": {"scale": 1.0},
    "ties": {"density": 1.0},
    "dare": {"drop": 0.0},
}
"""Values with which a merge of equal models does not shorten what they learned."""


@each(MERGES)
def test_a_merge_of_a_model_with_itself_is_the_model(
    name: str, case: Case, results: Compute
) -> None:
    done, kind = results(name, case.network), case.label.removesuffix(" merge")
    stages = own(done.run(shapes.MERGED), "train")
    model = state_of(done, stages[-1])
    measured = own(done.run(case.label), "statistics")[-1:]
    sums = [load_tensors(done.store.read("statistics", s.key, STATISTICS)) for s in measured]
    # Of the task's images; three, or one where there is only one.
    images = sum(done.shape.train[-1].values())
    assert [int(each["__count__"]) for each in sums] == [min(3, images)] * len(sums)
    given = [{n: t / 3 for n, t in each.items() if n != "__count__"} for each in sums] * 2
    merge = merging.build(kind, {})
    # From a start that is the model, too.
    found = merge_states(merge, [model, model], model, given or None)
    for tensor, value in model.items():
        if kind == "regmean":
            torch.testing.assert_close(found[tensor], value, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found[tensor], value), tensor
    if merge.card.base:
        base = start_of(done, stages[0])
        found = merge_states(merging.build(kind, WHOLE.get(kind, {})), [model, model], base)
        for tensor, value in model.items():
            torch.testing.assert_close(found[tensor], value, rtol=0, atol=1e-6)


# Ensembles.


def member_scores(done: Computed, label: str, task: int) -> np.ndarray:
    """Scores [N, C] of a member after a task."""
    run, seen = done.run(label), done.shape.seen[task]
    kept = scores_after(done, run, task)
    number = sum(pair[0] <= task for pair in done.shape.tested())
    if kept is not None:
        return kept[:number, :seen].double().numpy()
    assert run.model is not None
    features = np.concatenate(rows_of(done, run.evaluate, EvaluateHints)[1][: task + 1])
    found = states.load_states(done.store, "fit", run.model.key)
    method = building.fitted(from_json(MethodRef, run.model.parameters["method"]))
    state = found[task if len(found) > 1 else 0]
    scores = method.logits(state, torch.from_numpy(features.astype(np.float32)), 0)
    if len(found) == 1 and len(done.shape.train) > 1:
        scores = scores[:, rows_of_classes(done, run)[:seen]]
    return scores.double().numpy()


@each(RULES)
def test_an_ensemble_is_its_rule_on_the_scores_of_its_members(
    name: str, case: Case, results: Compute
) -> None:
    done, kind = results(name, case.network), case.label.removesuffix(" ensemble")
    table, rule = run_of(done, case)[1], ensembling.build(kind, {})
    for task, seen in enumerate(done.shape.seen):
        stack = np.stack([member_scores(done, label, task) for label in shapes.MEMBERS])
        assert stack.shape[2] == seen
        expected = by_hand.RULES[kind](stack)
        found = rule.combine(torch.from_numpy(stack)).numpy()
        # Ranks are divided in float32.
        np.testing.assert_allclose(found, expected, rtol=1e-6 if kind == "vote" else 1e-12)
        after = table["task_trained"] == task
        assert table["predicted"][after].tolist() == expected.argmax(axis=1).tolist()
        for label, scores in zip(shapes.MEMBERS, stack, strict=True):
            alone = rule.combine(torch.from_numpy(scores[None])).numpy()
            own_table = run_of(done, Case(label, "vit"))[1]
            own_after = own_table["predicted"][own_table["task_trained"] == task]
            assert alone.argmax(axis=1).tolist() == own_after.tolist()
            if kind in ("mean_logit", "max_logit", "energy_route"):
                assert np.array_equal(alone, scores)


# The same stream in other surroundings.


def again(done: Computed, network: Network, folder: Path, given: Any = (), **changes: Any) -> Any:
    """A changed shape in the same store, and the operators of what had to be computed for it."""
    other = shapes.planned(replace(done.shape, **changes), network, folder, done.store, given)
    missing = [s for s in other.plan.stages if not done.store.has(s.operator, s.key)]
    pngs.compute(missing, done.store)
    return other, {stage.operator for stage in missing}


def of_method(table: predictions.Table, names: tuple[str, ...]) -> list[list[int]]:
    return [table[name].tolist() for name in names]


@pytest.mark.parametrize("network", shapes.NETWORKS)
def test_a_class_that_is_never_trained_changes_no_prediction(
    network: Network, results: Compute, tmp_path: Path
) -> None:
    done = results("a class that is never trained", network)
    other, computed = again(done, network, tmp_path, others={}, absent=())
    # What was trained, merged and predicted is found; fits of all orders know all classes.
    assert computed <= {"dataset", "features", "text", "fit", "evaluate", "ensemble"}
    for case in [case for case in CASES if case.network == network]:
        before, after = (run_of(each_of, case)[1] for each_of in (done, other))
        assert all(np.array_equal(before[n], after[n]) for n in before), case.label
        if case in CLOSED or case.label == "zs_clip":
            # Scores of a fit on all classes are columns of a wider product, which rounds otherwise.
            wide = "columns" in done.run(case.label).evaluate.parameters
            assert wide == (case.label not in ("slda", "acil", "ranpac", "joint_linear"))
            for task in done.shape.tasks:
                one, two = (member_scores(each_of, case.label, task) for each_of in (done, other))
                if wide:
                    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
                else:
                    assert np.array_equal(one, two), case.label


@pytest.mark.parametrize("network", shapes.NETWORKS)
def test_a_class_without_test_images_changes_only_what_is_counted(
    network: Network, results: Compute, tmp_path: Path
) -> None:
    done = results("a class without test images", network)
    test = ({0: 2, 1: 3}, {2: 1, 3: 3})
    other, computed = again(done, network, tmp_path, test=test)
    assert "train" not in computed and "fit" not in computed and "merge" not in computed
    tested = {column for _, column in done.shape.tested()}
    for case in [case for case in CASES if case.network == network]:
        before, after = (run_of(each_of, case)[1] for each_of in (done, other))
        both = np.isin(after["label"], list(tested))
        names = ("task_trained", "true_task", "label", "predicted", "predicted_in_task")
        assert all(before[n].tolist() == after[n][both].tolist() for n in names), case.label
        assert len(after["label"]) == 5 + 5 + 4 > len(before["label"]) == 2 + 2 + 3
        facts = [
            json.loads(done.store.read("evaluate", o.run(case.label).evaluate.key, "summary.json"))
            for o in (done, other)
        ]
        assert [v is None for v in facts[0]["per_class"]] == [True, False, False, True]
        assert None not in facts[1]["per_class"]
        for column in tested:
            assert facts[0]["per_class"][column] == facts[1]["per_class"][column]


@pytest.mark.parametrize("case", FITTED, ids=lambda case: case.label)
def test_other_names_within_tasks_permute_columns(
    case: Case, results: Compute, tmp_path: Path
) -> None:
    done = results("tasks of 3, 1 and 4 classes", "vit")
    ranks = sorted(shapes.NAMES)
    turned = tuple("hgfedcba"[ranks.index(name)] for name in shapes.NAMES)
    arrival = (0, 2, 1, 3, 4, 6, 7, 5)
    other, _ = again(
        done, "vit", tmp_path, [shapes.entry(case.label)], names=turned, arrival=arrival
    )
    [run] = other.plan.runs
    columns = [arrival.index(label) for label in done.shape.arrival]
    for task, seen in enumerate(done.shape.seen):
        one, two = (
            member_scores(o, r.method.label, task)
            for o, r in ((done, done.run(case.label)), (other, run))
        )
        np.testing.assert_allclose(two[:, columns[:seen]], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"equal images-{case.label}")
def test_equal_images_have_equal_answers(case: Case, results: Compute) -> None:
    done = results("equal images", case.network)
    run, table = run_of(done, case)
    # The first image of each class of the first domain, and of the class that comes again.
    assert [table["label"][table["task_trained"] == 1][row] for row in (0, 2, 4)] == [1, 0, 0]
    for task, places in ((0, (0, 2)), (1, (0, 2, 4))):
        predicted = table["predicted"][table["task_trained"] == task]
        assert len({int(predicted[place]) for place in places}) == 1
        scores = scores_after(done, run, task)
        if scores is not None:
            rows = scores[list(places)]
            torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", ["listed", "domain"])
def test_a_first_task_that_nothing_tests_is_refused_by_name(cut: Any, tmp_path: Path) -> None:
    """An image of a class that no task learns tests nothing either."""
    first = {5: 1} if cut == "listed" else {}
    none = replace(SHAPES["a class without test images"], test=(first, {3: 1}), cut=cut)
    store = Store(str(tmp_path / "store"))
    with pytest.raises(BadDataError, match=r'task "(task|domain) 0".* has no test images'):
        shapes.planned(none, "vit", tmp_path, store, ["simplecil"])


def test_a_later_task_that_nothing_tests_leaves_a_gap(tmp_path: Path) -> None:
    """Its classes are learned, and may be taken for those of other images."""
    shape = replace(SHAPES["a class without test images"], test=({0: 3, 1: 2}, {5: 1}))
    store = Store(str(tmp_path / "store"))
    made = shapes.planned(shape, "vit", tmp_path, store, ["simplecil", "finetune"]).plan
    pngs.compute(made.stages, store)
    for run in made.runs:
        table = predictions.read(store, "evaluate", run.evaluate.key)
        summary = json.loads(store.read("evaluate", run.evaluate.key, "summary.json"))
        right = table["label"] == table["predicted"]
        curve = [100 * right[table["task_trained"] == task].mean() for task in (0, 1)]
        assert np.bincount(table["task_trained"]).tolist() == [5, 5]
        assert summary["curve"] == pytest.approx(curve)
        assert summary["matrix"] == [[curve[0]], [curve[1], None]]
        assert summary["bwt"] == pytest.approx(curve[1] - curve[0])
        assert summary["a_last_macro_task"] == pytest.approx(curve[1])
