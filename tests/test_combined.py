"""Merges and ensembles as results of a pipeline: planned, computed without Ray, explained."""

import json
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.nn import functional as F

from graftwork import methods
from graftwork.cluster.execution.graph import walk
from graftwork.methods.baselines.finetune import Finetune
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Learner, learned
from graftwork.operators import building, catalogue, ensembling, merging
from graftwork.operators.backbones import loading
from graftwork.operators.errors import ConfigError, DamagedStage, Diverged, IncompatibleError
from graftwork.operators.formats import predictions, selection, states
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import EvaluateHints, ImageHints
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.stage import Stage
from graftwork.operators.stages import statistics
from graftwork.operators.store import Store
from graftwork.operators.streams.scenario import class_order
from graftwork.operators.tracking.records import RunIds
from graftwork.operators.training import forward, loop, opening
from graftwork.operators.training.settings import Log, Settings
from graftwork.pipelines.explaining import explain
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.planning.runs import Run
from graftwork.pipelines.reporting import terminal
from graftwork.pipelines.running import recording
from graftwork.pipelines.running.finished import read
from graftwork.pipelines.running.finished import result as result_of
from tests import pngs, tiny
from tests.pngs import compute, of
from tests.test_merging import merge_states

FINETUNE = {"epochs": 1, "batch_size": 4, "lr": 0.05}
METHODS: list[Any] = [
    {"finetune": FINETUNE}, "simplecil", {"lora": {**FINETUNE, "rank": 2}}, {"joint": FINETUNE},
]  # fmt: skip
MERGE: list[Any] = [
    {"ties": {"of": "finetune", "density": 0.3, "scale": 0.55}},
    {"mean": {"of": "finetune", "over": "seeds"}},
    {"ema": {"of": "lora", "name": "slow lora", "head": "newest"}},
    {"fisher": {"of": "finetune", "images": 5, "labels": "model_expectation"}},
    {"regmean": {"of": "finetune", "images": 5}},
]
ENSEMBLE: list[Any] = [
    {"mean_prob": {"of": ["finetune", "simplecil"], "scale": "standardise"}},
    {"vote": {"of": ["finetune", "slow lora", "joint"]}},
    {"max_logit": {"of": "finetune", "over": "seeds"}},
]
SECTIONS = {"methods": METHODS, "seeds": [0, 1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    return pngs.data(place, pngs.rows(3, 0), pngs.rows(2, 5000))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    """Three tasks of two classes, all results of the first of two seeds computed."""
    store = Store(str(tmp_path_factory.mktemp("whole")))
    made = planned(store, folder, merge=MERGE, ensemble=ENSEMBLE)
    compute(needed(made), store)
    return store, made


def planned(store: Store, folder: Path, *overrides: str, **sections: Any) -> Plan:
    # Through JSON: values that occur twice would become anchors in YAML, which specs refuse.
    return pngs.plan(store, folder, *overrides, **json.loads(json.dumps(SECTIONS | sections)))


def needed(made: Plan) -> tuple[Stage, ...]:
    """The stages behind the results of seed 0; of seed 1 only what is combined with them."""
    return walk([run.evaluate for run in made.runs if run.seed == 0])


def run_of(made: Plan, label: str, seed: int = 0) -> Run:
    [found] = [run for run in made.runs if (run.method.label, run.seed) == (label, seed)]
    return found


def own(run: Run, operator: str) -> list[Stage]:
    return [stage for stage in run.own if stage.operator == operator]


def state(store: Store, stage: Stage) -> dict[str, Tensor]:
    return load_tensors(store.read(stage.operator, stage.key, "state.safetensors"))


def start_of(made: Plan, stage: Stage) -> dict[str, Tensor]:
    """The state before the training of a stage."""
    network = loading.load(made.backbone.model, made.backbone.weights, "token")
    learner, backbone = loop.open_learner(
        building.trained(pngs.learner_of(stage).method), network,  # type: ignore[arg-type]
        pngs.task_of(stage), None, Settings(seed=stage.parameters["seed"]),
    )  # fmt: skip
    return learned(learner, backbone)


def scores_of(store: Store, stage: Stage) -> dict[str, Tensor]:
    return load_tensors(store.read("predict", stage.key, "scores.safetensors"))


# --- merges -----------------------------------------------------------------------------------


def test_a_merge_of_a_chain_is_that_of_its_states(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    run, parent = run_of(made, "ties of finetune over tasks"), run_of(made, "finetune")
    chain = own(parent, "train")
    ties = merging.build("ties", {"density": 0.3, "scale": 0.55})
    base = start_of(made, chain[0])
    for number, stage in enumerate(own(run, "merge")):
        states = [state(store, s) for s in chain[: number + 1]]
        expected, found = merge_states(ties, states, base), state(store, stage)
        assert found.keys() == expected.keys() == states[-1].keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert found["head.weight"].shape == (2 * number + 2, 16)
        # The start has the rows of the first task alone: heads are the newest.
        assert torch.equal(found["head.weight"], states[-1]["head.weight"]) == bool(number)
    facts = store.manifest("merge", own(run, "merge")[-1].key)["facts"]
    assert facts["models"] == 3
    assert facts["state_bytes"] == sum(t.nbytes for t in state(store, chain[-1]).values())


def test_a_merged_state_predicts_like_the_learner_that_holds_it(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    run = run_of(made, "ties of finetune over tasks")
    [last, model] = own(run, "predict")[-1], own(run, "merge")[-1]
    network = loading.load(made.backbone.model, made.backbone.weights, "token")
    learner, _ = loop.open_learner(
        methods.build("finetune", FINETUNE), network,  # type: ignore[arg-type]
        pngs.task_of(model), state(store, model), Settings(seed=0),
    )  # fmt: skip
    work = last.assignment()
    hints = from_json(ImageHints, work.hints)
    every = selection.joined(selection.rows_of(work, store, hints.selection))
    # Images are read in the order of the data set, scores stand task by task.
    rows = every.at(np.argsort(every.position))
    assert rows.position.tolist() == list(range(12))
    images = opening.open_rows(pngs.learner_of(last), hints, rows, None)
    scores = forward.forward_plain(learner.eval().logits, learner, images, Settings(seed=0), Log())
    expected = scores[torch.from_numpy(every.position)]
    torch.testing.assert_close(scores_of(store, last)["scores"], expected)
    table = predictions.read(store, "evaluate", run.evaluate.key)
    final = table["task_trained"] == 2
    labels = made.data.sources[0].test.labels[every.position].tolist()
    assert [run.stream.ids[label] for label in table["label"][final]] == labels
    assert table["predicted"][final].tolist() == expected.argmax(1).tolist()
    facts = store.manifest("evaluate", run.evaluate.key)["facts"]
    assert facts["forwards"] == 4 + 8 + 12 and facts["training"] == []
    assert facts["trainable_parameters"] > 0


def test_seeds_are_merged_task_by_task(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    run = run_of(made, "mean of finetune over seeds")
    assert run.method.hyperparameters["seeds"] == [0, 1]
    assert [r.seed for r in made.runs if r.method.label == run.method.label] == [0]
    chains = [own(run_of(made, "finetune", seed), "train") for seed in (0, 1)]
    for number, stage in enumerate(own(run, "merge")):
        states = [state(store, chain[number]) for chain in chains]
        found = state(store, stage)
        for name in found:
            torch.testing.assert_close(found[name], (states[0][name] + states[1][name]) / 2)


def test_what_a_method_attached_is_merged_by_name_and_heads_as_asked(
    whole: tuple[Store, Plan],
) -> None:
    store, made = whole
    run = run_of(made, "slow lora")
    states = [state(store, stage) for stage in own(run_of(made, "lora"), "train")]
    found = state(store, own(run, "merge")[-1])
    name = "vit.blocks.0.attn.qkv.up.weight"
    expected = 0.5 * (0.5 * (states[0][name] + states[1][name]) + states[2][name])
    torch.testing.assert_close(found[name], expected)
    for head in ("head.weight", "head.bias"):
        assert torch.equal(found[head], states[2][head])
    assert found.keys() == states[2].keys()


def test_fisher_information_is_summed_over_shards(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    run = run_of(made, "fisher of finetune over tasks")
    shards = own(run, "statistics")
    assert len(shards) == 3 * 2 and [s.hints["images"] for s in shards[:2]] == [4, 1]
    kept = [load_tensors(store.read("statistics", s.key, "statistics.safetensors")) for s in shards]
    assert [int(sums["__count__"]) for sums in kept] == [4, 1] * 3
    averaged = [
        {n: ((kept[i][n].double() + kept[i + 1][n]) / 5).float() for n in kept[i]}
        for i in (0, 2, 4)
    ]
    states = [state(store, stage) for stage in own(run_of(made, "finetune"), "train")]
    merge = merging.build("fisher", {"images": 5})
    expected, found = (
        merge_states(merge, states, None, averaged),
        state(store, own(run, "merge")[-1]),
    )
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    assert all(bool((s[n] >= 0).all()) for s in averaged for n in s)
    assert [s.parameters["shard"] for s in shards[:2]] == [[0, 4], [4, 5]]


def test_regmean_changes_linear_layers_and_averages_the_rest(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    states = [state(store, stage) for stage in own(run_of(made, "finetune"), "train")]
    found = state(store, own(run_of(made, "regmean of finetune over tasks"), "merge")[-1])
    mean = merge_states(merging.build("mean", {}), states)
    differing = {n for n in found if not torch.allclose(found[n], mean[n], atol=1e-7)}
    assert "vit.blocks.1.mlp.fc2.weight" in differing and "head.weight" in differing
    assert all(name.endswith("weight") and found[name].ndim == 2 for name in differing)


def test_a_damaged_model_is_told(whole: tuple[Store, Plan], tmp_path: Path) -> None:
    store, made = whole
    stage = own(run_of(made, "mean of finetune over seeds"), "merge")[0]
    with store.file("merge", stage.key, "state.safetensors") as path:
        content = path.read_bytes()
        assert content == store.read("merge", stage.key, "state.safetensors")
        path.chmod(0o644)
        path.write_bytes(content[:-1] + b"\7")
    with pytest.raises(DamagedStage, match=r"state\.safetensors has sha256"):
        store.file("merge", stage.key, "state.safetensors").__enter__()
    path.unlink()
    with pytest.raises(DamagedStage, match=r"state\.safetensors is missing"):
        store.file("merge", stage.key, "state.safetensors").__enter__()
    path.write_bytes(content)


def test_files_of_an_object_store_are_copied() -> None:
    store = Store("memory://merge-files")
    stage = Stage(operator="merge", parameters={"x": 1})
    from graftwork.operators.assignment import Result

    store.commit(stage.assignment(), Result(files={"a": bytearray(b"abc")}), 0.0)
    with store.file("merge", stage.key, "a") as path:
        assert path.read_bytes() == b"abc"
    assert not path.exists()


def test_methods_with_other_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    """While planning, by the shapes of what the methods hold."""
    store = Store(str(tmp_path))
    lora = [{"lora": {**FINETUNE, "rank": 2}}, {"lora": {**FINETUNE, "rank": 3}}]
    for methods_, of_, said in (
        ([{"finetune": FINETUNE}, lora[0]], ["finetune", "lora"], "is missing in model"),
        (
            lora,
            [f"lora batch_size=4 epochs=1 lr=0.05 rank={rank}" for rank in (2, 3)],
            r"qkv.up.weight \[48, 2\], \[48, 3\]",
        ),
    ):
        sections = {"methods": methods_, "merge": [{"mean": {"of": of_}}], "seeds": [0]}
        for _ in range(2):  # looked at, and remembered
            with pytest.raises(IncompatibleError, match="models do not fit together") as caught:
                planned(store, folder, **sections)
            assert re.search(said, str(caught.value))
            assert caught.value.key == "merge.0.mean.of"
    rates = [{"finetune": FINETUNE}, {"finetune": {**FINETUNE, "lr": 0.1}}]
    labels = [run.method.label for run in planned(store, folder, methods=rates, seeds=[0]).runs]
    planned(store, folder, methods=rates, merge=[{"mean": {"of": labels}}], seeds=[0])


def test_a_merge_that_is_not_finite_is_not_stored(whole: tuple[Store, Plan], folder: Path) -> None:
    store, _ = whole
    merge = [{"task_arithmetic": {"of": "finetune", "scale": 1e39}}]
    made = planned(store, folder, merge=merge)
    run = run_of(made, "task_arithmetic of finetune over tasks")
    with pytest.raises(Diverged, match=r"is NaN or infinite; lower the merge's scale"):
        compute(own(run, "merge")[:1], store)
    assert not store.has("merge", own(run, "merge")[0].key)


# --- statistics -------------------------------------------------------------------------------


class Given:
    """Images that are there."""

    def __init__(self, pixels: Tensor, targets: Tensor) -> None:
        self.pixels, self.targets = pixels, targets
        self.query: Tensor | None = None
        self.exemplars = torch.zeros(len(targets), dtype=torch.bool)

    def batch(self, rows: Any, epoch: int, augmentation: str) -> Tensor:
        return self.pixels[list(rows)]

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels

    def name(self, row: int, /) -> str:
        return str(row)


class Linear(Learner):
    """Logits x W^T; it has no backbone."""

    def __init__(self, weight: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.head = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
        self.head.weight.data.copy_(weight)

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        return self.head(images)


def test_squared_gradients_are_those_of_each_image() -> None:
    torch.manual_seed(0)
    weight, x, targets = torch.randn(3, 4), torch.randn(7, 4), torch.arange(7) % 3
    learner, images = Linear(weight), Given(x, targets)
    p = F.softmax(x @ weight.T, dim=1)

    def squared(label: int, row: int) -> Tensor:
        """Of (e_label - p) x^T."""
        return torch.outer(F.one_hot(torch.tensor(label), 3) - p[row], x[row]).square()

    def found(labels: str, seeds: list[int]) -> Tensor:
        sums = statistics.squared_gradients(
            learner,
            dict(learner.named_parameters()),
            images,
            Settings(seed=0),
            labels,
            seeds,
        )
        return sums["head.weight"]

    seeds = list(range(7))
    truth = sum(squared(int(targets[row]), row) for row in range(7))
    torch.testing.assert_close(found("ground_truth", seeds), truth)
    expectation = sum(float(p[row, c]) * squared(c, row) for row in range(7) for c in range(3))
    torch.testing.assert_close(found("model_expectation", seeds), expectation)
    # One label per image: right on average, and the same for the same seeds.
    draws = torch.stack([found("model_sample", [100 * n + s for s in seeds]) for n in range(300)])
    torch.testing.assert_close(draws.mean(0), expectation, rtol=0.2, atol=0.1)
    assert torch.equal(found("model_sample", seeds), found("model_sample", seeds))


def test_gram_matrices_are_sums_over_inputs() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    learner = Linear(torch.zeros(2, 4))
    sums = statistics.gram_matrices(
        learner,
        {"head.weight": learner.head.weight},
        Given(x, torch.zeros(6)),
        Settings(seed=0),  # type: ignore[arg-type]
    )
    torch.testing.assert_close(sums["head.weight"], x.T @ x)
    # What is not asked for is not measured, and nothing of the watch is left.
    given = Given(x, torch.zeros(6)), Settings(seed=0)
    assert statistics.gram_matrices(learner, {}, *given) == {}  # type: ignore[arg-type]


@pytest.fixture
def photographed() -> tuple[Learner, Given]:
    """A fine-tuned network of real layers, and six images."""
    task = tiny.task(0)
    learner, _ = loop.open_learner(
        Finetune(), tiny.vit(2), task, None, Settings(seed=0, device="cpu")
    )
    images = tiny.images(task, per_class=2)
    return learner.eval(), Given(images.pixels, images.targets)


def plainly(precision: str) -> Any:
    """The surroundings of a forward pass, written once more."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16)


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Distance of two results relative to their size."""
    both = [torch.cat([part.flatten() for _, part in sorted(p.items())]) for p in (one, other)]
    return float((both[0] - both[1]).norm() / both[0].norm())


def test_fisher_information_has_the_precision_of_the_training(
    photographed: tuple[Learner, Given],
) -> None:
    learner, images = photographed
    named = {name: p for name, p in learner.named_parameters() if p.requires_grad}

    def found(precision: str) -> State:
        settings = Settings(seed=0, precision=precision)
        return statistics.squared_gradients(
            learner, dict(named), images, settings, "ground_truth", [0] * 6
        )

    def expected(precision: str) -> State:
        sums = {name: torch.zeros_like(p) for name, p in named.items()}
        for pixels, target in zip(images.pixels, images.targets, strict=True):
            with plainly(precision):
                scores = learner.logits(pixels[None], None)
            loss = F.log_softmax(scores.float(), dim=1)[0, target]
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    sums[name].addcmul_(gradient, gradient)
        return sums

    for precision in ("fp32", "bf16"):
        one, other = found(precision), expected(precision)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    # Eight bits of mantissa: 2^-9 per operation, of which a gradient goes through a few dozen.
    assert 2**-11 < apart(found("fp32"), found("bf16")) < 0.2


def test_gram_matrices_are_of_inputs_in_the_precision_of_the_training(
    photographed: tuple[Learner, Given],
) -> None:
    learner, images = photographed

    def found(precision: str) -> State:
        return statistics.gram_matrices(
            learner,
            dict(learner.named_parameters()),
            images,
            Settings(seed=0, precision=precision),
        )

    def expected(precision: str) -> State:
        """Sums in float64 of what every layer is handed."""
        sums: State = {}

        def watch(name: str, layer: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach().flatten(0, -2).double()
            with torch.autocast("cpu", enabled=False):
                sums[name] = sums.get(name, 0) + rows.T @ rows

        handles = [
            layer.register_forward_pre_hook(partial(watch, f"{name}.weight"))
            for name, layer in learner.named_modules()
            if isinstance(layer, torch.nn.Linear)
        ]
        for pixels in images.pixels:
            with torch.no_grad(), plainly(precision):
                learner.logits(pixels[None], None)
        for handle in handles:
            handle.remove()
        return {name: total.float() for name, total in sums.items()}

    for precision in ("fp32", "bf16"):
        one, other = found(precision), expected(precision)
        assert one.keys() == other.keys()
        # Sums of float32 products: far below the roundings of bf16, in which no sum may be taken.
        assert apart(one, other) < 1e-6
        assert all(total.dtype == torch.float32 for total in one.values())
    assert 2**-11 < apart(found("fp32"), found("bf16")) < 0.1


# --- ensembles --------------------------------------------------------------------------------


def fitted_scores(store: Store, run: Run, number: int) -> np.ndarray:
    """Scores of a fitted method on the images of the tasks up to one, columns by arrival."""
    work, keyed = run.evaluate.assignment(), run.model.parameters
    given = from_json(EvaluateHints, work.hints).selection
    rows = selection.joined(selection.rows_of(work, store, given)[: number + 1])
    matrix = selection.matrix(work, store, given, rows)
    assert matrix is not None
    [state] = states.load_states(store, "fit", run.model.key)
    method = building.fitted(from_json(MethodRef, keyed["method"]))
    scores = method.logits(state, torch.from_numpy(matrix.astype(np.float32)), 0)
    # The fit serves all orders: its columns are the data set's own numbers.
    return scores.numpy()[:, list(run.stream.ids[: 2 * number + 2])]


def test_an_ensemble_is_what_numpy_makes_of_the_scores(whole: tuple[Store, Plan]) -> None:
    """Trained and fitted: mean of softmax of standardised scores, columns by arrival."""
    store, made = whole
    run = run_of(made, "mean_prob of finetune and simplecil over methods")
    table = predictions.read(store, "evaluate", run.evaluate.key)
    tuned, fitted = run_of(made, "finetune"), run_of(made, "simplecil")
    for number, stage in enumerate(own(tuned, "predict")):
        both = [
            scores_of(store, stage)["scores"].double().numpy(),
            fitted_scores(store, fitted, number).astype(np.float64),
        ]
        assert both[0].shape == both[1].shape == (4 * number + 4, 2 * number + 2)
        total = np.zeros_like(both[0])
        for scores in both:
            scores = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
            total += np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        after = table["task_trained"] == number
        assert table["sample"][after].tolist() == list(range(4 * number + 4))
        assert table["predicted"][after].tolist() == total.argmax(1).tolist()
    facts = store.manifest("evaluate", run.evaluate.key)["facts"]
    assert facts["forwards"] == 0
    parts = [store.manifest("ensemble", own(run, "ensemble")[0].key)["seconds"]]
    assert facts["seconds_fitting"] == pytest.approx(sum(parts))


def test_an_ensemble_takes_merges_and_a_method_that_predicts_once(
    whole: tuple[Store, Plan],
) -> None:
    store, made = whole
    run = run_of(made, "vote of finetune, slow lora and joint over methods")
    members = [run_of(made, label) for label in ("finetune", "slow lora", "joint")]
    assert [p.evaluate.key for p in run.parents] == [m.evaluate.key for m in members]
    assert len(run.evaluate.inputs["predictions"]) == 1
    single = [predictions.read(store, "evaluate", m.evaluate.key) for m in members]
    table = predictions.read(store, "evaluate", run.evaluate.key)
    for row in range(len(table["sample"])):
        votes = [int(t["predicted"][row]) for t in single]
        most = max(votes.count(v) for v in votes)
        assert table["predicted"][row] in [v for v in votes if votes.count(v) == most]


def test_seeds_are_combined_like_methods(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    run = run_of(made, "max_logit of finetune over seeds")
    stages = [own(run_of(made, "finetune", seed), "predict")[-1] for seed in (0, 1)]
    scores = torch.stack([scores_of(store, s)["scores"] for s in stages]).amax(0)
    table = predictions.read(store, "evaluate", run.evaluate.key)
    final = table["task_trained"] == 2
    assert table["predicted"][final].tolist() == scores.argmax(1).tolist()


# --- planning ---------------------------------------------------------------------------------


def combined_keys(made: Plan) -> dict[str, str]:
    return {f"{r.method.label} {r.seed}": r.evaluate.key for r in made.runs if r.parents}


def test_combinations_change_no_key_of_what_they_combine(
    whole: tuple[Store, Plan], folder: Path
) -> None:
    store, made = whole
    plain = {stage.key for stage in planned(store, folder).stages}
    assert plain < {stage.key for stage in made.stages}


def test_names_and_the_order_of_entries_and_methods_change_no_key(
    whole: tuple[Store, Plan], folder: Path
) -> None:
    store, made = whole
    before = combined_keys(made)
    turned = planned(
        store, folder, methods=METHODS[::-1], merge=MERGE[::-1], ensemble=ENSEMBLE[::-1]
    )
    assert combined_keys(turned) == before
    renamed = [
        {**e, next(iter(e)): {**next(iter(e.values())), "name": f"n{i}"}}
        for i, e in enumerate(MERGE)
    ]
    again = planned(store, folder, merge=renamed)
    assert sorted(combined_keys(again).values()) == sorted(
        key for label, key in before.items()
        if label.partition(" ")[0] not in ("mean_prob", "vote", "max_logit")
    )  # fmt: skip
    unlike = planned(store, folder, "resources.fit={cpus: 2}", merge=MERGE, ensemble=ENSEMBLE)
    assert combined_keys(unlike) == before


@pytest.mark.parametrize(
    ("entry", "changed"),
    [
        ({"density": 0.3, "scale": 0.55}, False),
        ({"density": 0.4, "scale": 0.55}, True),
        ({"density": 0.3, "scale": 0.55, "trim": "global"}, False),
        ({"density": 0.3, "scale": 0.55, "trim": "tensor"}, True),
        ({"density": 0.3, "scale": 0.55, "head": "newest"}, True),
        ({"density": 0.3, "scale": 0.55, "over": "tasks"}, False),
        ({"density": 0.3, "scale": 0.55, "over": "seeds"}, True),
    ],
)
def test_a_key_changes_with_what_changes_the_merge(
    entry: dict[str, Any], changed: bool, whole: tuple[Store, Plan], folder: Path
) -> None:
    store, made = whole
    after = planned(store, folder, merge=[{"ties": {"of": "finetune", **entry}}])
    keys = {stage.key for stage in of(after, "merge")}
    assert bool(keys - {stage.key for stage in of(made, "merge")}) == changed
    assert {s.key for s in of(after, "train")} == {s.key for s in of(made, "train")}


def test_a_merge_of_a_fixed_number_takes_the_newest(
    folder: Path, whole: tuple[Store, Plan]
) -> None:
    store, _ = whole
    merge = [{"slerp": {"of": "finetune"}}, {"wise_ft": {"of": "finetune"}}]
    made = planned(store, folder, merge=merge)
    chain = [s.key for s in own(run_of(made, "finetune"), "train")]

    def taken(label: str) -> list[list[str]]:
        return [[s.key for s in m.inputs["models"]] for m in own(run_of(made, label), "merge")]

    assert taken("slerp of finetune over tasks") == [chain[:1], chain[:2], chain[1:]]
    assert taken("wise_ft of finetune over tasks") == [[key] for key in chain]


def test_a_plan_explains_combinations(whole: tuple[Store, Plan], folder: Path) -> None:
    store, made = whole
    found = explain.explain(made, store)
    assert found.counts["hit"] == len(needed(made))
    assert "merge ties of finetune over tasks order 1993 seed 0" in {r.group for r in found.stages}
    other = planned(
        store, folder, merge=[{"ties": {"of": "finetune", "density": 0.4, "scale": 0.55}}]
    )
    rows = explain.explain(other, store).stages
    missing = [row for row in rows if row.status == "miss" and "seed 0" in row.stage]
    assert sorted(row.operator for row in missing) == (
        ["evaluate"] + ["merge"] * 3 + ["predict"] * 3
    )
    assert missing[0].why == "merge.hyperparameters.density: 0.3 -> 0.4"
    assert "merge ties" in explain.mermaid(made, store)


def test_a_stage_is_needed_by_those_whose_parents_do_not_need_it(
    whole: tuple[Store, Plan],
) -> None:
    _, made = whole
    found = recording.needed_by(made.runs)

    def names(stages: list[Stage]) -> set[tuple[tuple[str, int], ...]]:
        return {
            tuple((run.method.label, run.seed) for run in map(made.runs.__getitem__, found[s.key]))
            for s in stages
        }

    assert found.keys() == {stage.key for stage in made.stages}
    # Merges and ensembles read what was trained, and it counts for the method alone.
    finetune = run_of(made, "finetune")
    assert names([*own(finetune, "train"), *own(finetune, "predict")]) == {(("finetune", 0),)}
    ties = run_of(made, "ties of finetune over tasks")
    assert names([*own(ties, "merge"), *own(ties, "predict"), ties.evaluate]) == {
        (("ties of finetune over tasks", 0),)
    }
    # Features: of the method that reads them, not of the ensemble over it.
    features = of(made, "features")
    assert features and names(features) == {(("simplecil", 0), ("simplecil", 1))}


def test_results_name_their_parents(whole: tuple[Store, Plan]) -> None:
    store, made = whole
    run = run_of(made, "mean of finetune over seeds")
    finished = read(store, run, cached=False)
    ids = RunIds(
        experiment_id="1", run_id="2", unsent=0, problem="",
        methods={run.parents[1].evaluate.key: "abc", run.evaluate.key: "def"},
    )  # fmt: skip
    result = result_of(finished, ids)
    assert result.method == result.label == "mean of finetune over seeds"
    assert result.mlflow_run_id == "def"
    assert [asdict(parent) for parent in result.parents] == [
        {"label": "finetune", "order": 1993, "seed": seed, "mlflow_run_id": name}
        for seed, name in ((0, None), (1, "abc"))
    ]
    logged = recording.method_run(made, store, finished, with_model=False)
    assert logged.tags["graftwork.parents"] == " ".join(p.evaluate.key for p in run.parents)
    assert logged.params["merge"] == "mean" and logged.params["of"] == ["finetune"]
    assert not isinstance(logged.artifacts, Mapping)
    artifacts, arrived = logged.artifacts(), class_order(6, 1993)
    assert json.loads(str(artifacts["classes.json"])) == [str(c) for c in arrived]
    assert json.loads(str(artifacts["class_order.json"])) == list(arrived)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"merge": [{"tise": {"of": "finetune"}}]},
     'merge.0.tise: unknown merge "tise"; did you mean "ties"?'),
    ({"merge": [{"ties": {"of": "finetune", "densty": 1}}]},
     'merge.0.ties.densty: unknown field "densty"; did you mean "density"?'),
    ({"merge": [{"ties": {"of": "finetune", "density": 2}}]},
     "merge.0.ties.density: must be above 0 and at most 1, got 2.0"),
    ({"merge": [{"ties": {}}]},
     "merge.0.ties.of: missing; name a method of this spec, or a list of them"),
    ({"merge": [{"ties": {"of": 3}}]},
     "merge.0.ties.of: must be a method's name or a list of them, got 3"),
    ({"merge": [{"mean": {"of": "finetnue"}}]},
     'merge.0.mean.of: no method "finetnue" among methods; did you mean "finetune"?'),
    ({"merge": [{"mean": {"of": "simplecil"}}]},
     "merge.0.mean.of: simplecil has no checkpoint of a network after every task to merge; name a "
     "method that trains on every task, or use ensemble"),
    ({"methods": ["esn"], "merge": [{"ema": {"of": "esn"}}]},
     "merge.0.ema.of: esn trains weights of its own for every task and leaves those of earlier "
     "tasks as they are, so that its models over tasks differ in nothing that a merge could "
     "change; merge over seeds"),
    ({"methods": ["magmax"], "merge": [{"regmean": {"of": "magmax"}}]},
     "merge.0.regmean.of: magmax predicts with weights that are no linear layers of their own, "
     "which regmean needs to measure; take another merge"),
    ({"merge": [{"mean": {"of": "joint"}}]},
     "merge.0.mean.of: joint trains on all tasks at once and has one checkpoint only"),
    ({"merge": [{"mean": {"of": ["finetune"]}}]},
     "merge.0.mean.of: needs at least 2 methods to combine, got 1"),
    ({"merge": [{"mean": {"of": ["finetune", "lora"], "over": "tasks"}}]},
     "merge.0.mean.of: must be one method to combine over tasks, got 2"),
    ({"merge": [{"mean": {"of": ["finetune", "finetune"]}}]},
     "merge.0.mean.of: must not name a method twice"),
    ({"merge": [{"mean": {"of": "finetune", "over": "seeds"}}], "seeds": [0]},
     "merge.0.mean.over: needs at least 2 seeds, got 1; give more seeds"),
    ({"merge": [{"mean": {"of": "finetune", "over": "orders"}}]},
     'merge.0.mean.over: must be one of tasks, seeds, methods, got "orders"'),
    ({"merge": [{"mean": {"of": "finetune", "head": "oldest"}}]},
     'merge.0.mean.head: must be one of merge, newest, got "oldest"'),
    ({"merge": [{"mean": {"of": "finetune", "name": ""}}]},
     "merge.0.mean.name: must be text of 1..100 characters, got 0 characters"),
    ({"merge": [{"mean": {"of": "finetune"}}] * 2}, "merge.1: same as merge.0; keep one"),
    ({"merge": ["mean"]},
     'merge.0: must be one combination like {ties: {of: finetune}}, got "mean"'),
    ({"merge": [{"ties": {"of": "finetune"}}, {"mean": {"of": "lora", "name": "finetune"}}]},
     'merge.1.mean: second result called "finetune"; give it another name'),
    ({"merge": [{"mean": {"of": "finetune"}}],
      "scenario": {"kind": "class_incremental", "increment": 6}},
     "merge.0.mean.over: the stream has one task; nothing to merge"),
    ({"methods": [{"finetune": {"lr": 0.1}}, {"finetune": {"lr": 0.2}}],
      "merge": [{"mean": {"of": "finetune"}}]},
     'merge.0.mean.of: "finetune" stands here for finetune lr=0.1, finetune lr=0.2; write one'),
    ({"ensemble": [{"mean_logits": {"of": ["finetune", "lora"]}}]},
     'ensemble.0.mean_logits: unknown ensemble "mean_logits"; did you mean "mean_logit"?'),
    ({"ensemble": [{"vote": {"of": ["finetune", "lora"], "scale": "l3"}}]},
     "ensemble.0.vote.scale: must be one of none, standardise, l2, got 'l3'"),
    ({"ensemble": [{"vote": {"of": "finetune"}}]},
     "ensemble.0.vote.of: needs at least 2 methods to combine, got 1"),
    ({"ensemble": [{"vote": {"of": "finetune", "over": "tasks"}}]},
     'ensemble.0.vote.over: must be one of methods, seeds, got "tasks"'),
    ({"ensemble": [{"vote": {"of": ["finetune", "lora"], "head": "newest"}}]},
     'ensemble.0.vote.head: unknown field "head"'),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "said"), WRONG, ids=[said[:60] for _, said in WRONG])
def test_what_cannot_be_combined_is_one_line_with_its_place(
    sections: dict[str, Any], said: str, whole: tuple[Store, Plan], folder: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(whole[0], folder, **sections)
    [line] = str(caught.value).splitlines()
    place, _, message = line.partition(": ")
    assert place.rpartition(":")[0].endswith("spec.yaml")
    assert message.startswith(said)


def test_all_problems_come_at_once(whole: tuple[Store, Plan], folder: Path) -> None:
    wrong = [{"ties": {"of": "simplecil", "density": 7}}, {"x": {"of": "y"}}]
    with pytest.raises(ConfigError) as caught:
        planned(whole[0], folder, merge=wrong)
    assert len(str(caught.value).splitlines()) == 4


def test_merges_and_rules_are_listed_beside_the_methods() -> None:
    cards = catalogue.cards()
    kinds = {name: card["contract"] for name, card in cards.items()}
    assert kinds["ties"] == "merge" and kinds["vote"] == "ensemble" and kinds["slca"] == "trained"
    assert set(kinds) >= {*methods.METHODS, *ensembling.RULES}
    card, fields = catalogue.card("ties")
    assert card["paper"] == "https://arxiv.org/abs/2306.01708"
    assert [f["name"] for f in fields] == ["density", "scale", "trim", "combine"]
    with pytest.raises(ConfigError, match='unknown method "tise"; did you mean "ties"'):
        catalogue.card("tise")


def test_the_listing_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (None, "ties", "energy_route"):
        terminal.methods(name, Console(width=200), as_json=False)
    printed = capsys.readouterr().out
    assert "Trims task vectors" in printed and "density" in printed and "by_size" in printed


def test_the_listing_says_which_network_a_method_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.methods(None, Console(width=200), as_json=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    at = {row[0]: number for number, row in enumerate(rows) if row}
    assert [rows[at["proof"]][1:3], rows[at["proof"] + 1][:2]] == [
        ["trained", "tasks"],
        ["on", "CLIP"],
    ]
    fused = at["promptfusion"]
    assert [row[:2] for row in rows[fused + 1 : fused + 3]] == [["on", "CLIP,"], ["a", "ViT"]]
    terminal.methods("promptfusion", Console(width=80), as_json=False)
    printed = capsys.readouterr().out
    facts = dict(line.split(None, 1) for line in printed.splitlines() if line.startswith("network"))
    assert facts["network"].strip() == "clip, vit"
