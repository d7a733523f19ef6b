"""Models of every kind of run beside the plain ones: on CLIP, of two networks, joined, combined.

Each is written as MLflow gets it, opened from its folder, and asked for the pipeline's test images.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from graftwork.operators import building, ensembling
from graftwork.operators.backbones import loading
from graftwork.operators.ensembling.scores import align
from graftwork.operators.errors import ConfigError, IncompatibleError
from graftwork.operators.formats import predictions, selection, states
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import EvaluateHints
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.serving import predictor as serving
from graftwork.operators.store import Store
from graftwork.operators.streams.scenario import class_order
from graftwork.operators.training import forward
from graftwork.pipelines.planning.plan import Plan, make_plan
from graftwork.pipelines.planning.runs import Run
from graftwork.pipelines.running import served_model
from graftwork.pipelines.spec.loading import load_resolved
from tests import pngs
from tests.test_promptfusion import BESIDE
from tests.test_text import BACKBONE, COOP, NAMES, ZSCL, reference

STEPS = {"epochs": 1, "batch_size": 4}
PLAIN = {**STEPS, "augmentation": "none"}
FUSION = {
    **STEPS, "context_length": 2, "image_prompt_length": 2, "vit_prompt_length": 2, "exemplars": 8,
}  # fmt: skip
ON_CLIP: dict[str, Any] = {
    "methods": [
        "zs_clip", COOP, ZSCL, {"proof": {**STEPS, "exemplars": 8}}, {"promptfusion": FUSION},
    ],
    "ensemble": [
        {"mean_prob": {"of": ["zs_clip", "promptfusion"], "scale": "standardise", "name": "prob"}},
    ],
}  # fmt: skip
ON_VIT: dict[str, Any] = {
    "methods": [
        "simplecil",
        {"aper_adapter": PLAIN},
        {"finetune": PLAIN},
        {"esn": {**PLAIN, "prompt_length": 2, "candidates": "fast"}},
        {"magmax_independent": PLAIN},
    ],
    "merge": [{"ties": {"of": "finetune", "name": "ties"}}],
    "ensemble": [
        {"vote": {"of": ["simplecil", "ties", "aper_adapter"], "name": "votes"}},
        {"energy_route": {"of": ["esn", "finetune"], "name": "routed"}},
    ],
}


class Made(NamedTuple):
    """Finished runs on one backbone."""

    folder: Path
    store: Store
    plan: Plan

    def run(self, label: str) -> Run:
        return pngs.run_of(self.plan, label)

    def model(self, label: str) -> Path:
        """The folder `data` of the run's model, written once."""
        run, place = self.run(label), self.folder / "models" / label
        for name, content in served_model.model(self.plan, self.store, run).items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            elif isinstance(content, str):
                path.write_text(content)
        return place / "model" / "data"

    def rows(self, run: Run) -> list[int]:
        """Of the test images, those of classes seen: task by task, as predictions have them."""
        labels, ids = self.plan.data.sources[0].test.labels.tolist(), run.stream.ids
        tasks = [ids[:2], ids[2:]]
        return [row for task in tasks for row, label in enumerate(labels) if label in task]

    def images(self, label: str) -> list[bytes]:
        images = pq.read_table(self.folder / "test.parquet")["image"].to_pylist()
        return [images[row] for row in self.rows(self.run(label))]

    def scores(self, run: Run) -> Tensor:
        """Of the images seen, after the last task, columns by arrival; as the store has them."""
        if (stages := run.evaluate.inputs.get("predictions")) is None:
            return self._fitted(run)
        if stages[-1].operator == "ensemble":
            keyed = stages[-1].parameters["rule"]
            rule = ensembling.build(keyed["name"], keyed["hyperparameters"])
            parts = [self.scores(parent) for parent in run.parents]
            return rule.combine(align(parts, [range(len(run.stream.classes))] * len(parts))[0])
        stored = load_tensors(
            self.store.read(stages[-1].operator, stages[-1].key, "scores.safetensors")
        )
        assert stored.keys() == {"scores"}
        return stored["scores"]

    def _fitted(self, run: Run) -> Tensor:
        work, keyed = run.evaluate.assignment(), run.model.parameters
        given = from_json(EvaluateHints, work.hints).selection
        every = selection.joined(selection.rows_of(work, self.store, given))
        assert every.position.tolist() == self.rows(run)
        matrix = selection.matrix(work, self.store, given, every)
        assert matrix is not None
        state = states.load_states(self.store, "fit", run.model.key)[-1]
        scores = building.fitted(from_json(MethodRef, keyed["method"])).logits(
            state, torch.from_numpy(matrix.astype(np.float32)), keyed["seed"] or 0
        )
        # A fit of all classes has the data set's own numbers, one of a stream those by arrival.
        own = run.evaluated.columns
        assert own == (run.stream.ids if len(keyed["tasks"]) == 1 else None)
        return scores if own is None else scores[:, list(own)]


def made(folder: Path, data: Path, **sections: Any) -> Made:
    # Through JSON: values that occur twice would become anchors in YAML, which specs refuse.
    sections = json.loads(json.dumps(sections))
    store = Store(str(folder / "store"))
    for name in ("train.parquet", "test.parquet"):
        (folder / name).write_bytes((data / name).read_bytes())
    names = f"dataset.classes={json.dumps(NAMES)}"
    plan = pngs.plan(store, folder, names, "scenario.tasks=2", **sections)
    pngs.compute(plan.stages, store)
    return Made(folder, store, plan)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    return pngs.data(place, pngs.rows(2, 0), pngs.rows(2, 5000))


@pytest.fixture(scope="module")
def on_clip(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("clip")
    save_file(loading.load(pngs.MODEL, "random", "token").state_dict(), folder / "vit.st")
    beside = {**BESIDE, "weights": str(folder / "vit.st")}
    return made(folder, data, backbone=BACKBONE, vit=beside, reference=reference(data), **ON_CLIP)


@pytest.fixture(scope="module")
def on_vit(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("vit"), data, **ON_VIT)


def check(made: Made, label: str) -> dict[str, Any]:
    """A model says what the pipeline stored; returns its description."""
    run, folder, images = made.run(label), made.model(label), made.images(label)
    predictor, expected = serving.Predictor(folder), made.scores(run)
    arrived = class_order(6, 1993)[:4]
    assert predictor.classes == [NAMES[c] for c in arrived] and len(images) == 8
    scores = predictor.logits(images)
    assert scores.shape == expected.shape == (8, 4)
    assert torch.equal(scores, expected), float((scores - expected).abs().max())
    # An image alone is what it is among others.
    assert torch.equal(predictor.logits(images[5:6]), scores[5:6])
    table = predictions.read(made.store, "evaluate", run.evaluate.key)
    last = table["task_trained"] == 1
    assert table["sample"][last].tolist() == list(range(8))
    best = serving.top(scores.numpy(), 1)[:, 0]
    assert best.tolist() == table["predicted"][last].tolist()
    labels = made.plan.data.sources[0].test.labels[made.rows(run)].tolist()
    assert [arrived[label] for label in table["label"][last]] == labels
    about = json.loads((folder / "model.json").read_text())
    assert (about["columns"], about["classes"]) == ([0, 1, 2, 3], predictor.classes)
    return about


@pytest.mark.parametrize("label", ["zs_clip", "coop", "zscl", "proof"])
def test_methods_on_clip(on_clip: Made, label: str) -> None:
    about = check(on_clip, label)
    assert about["predictor"]["kind"] == ("fitted" if label == "zs_clip" else "trained")
    requirements = (on_clip.model(label).parent / "requirements.txt").read_text()
    assert requirements.startswith("graftwork[clip]==")
    assert about["backbone"]["model"] == BACKBONE["model"] and "beside" not in about


def test_two_branches_see_the_image_as_each_was_trained(on_clip: Made) -> None:
    about = check(on_clip, "promptfusion")
    assert (about["size"], about["beside"]["preprocessing"]["crop"]) == (32, pngs.SIZE)
    assert about["beside"]["backbone"]["model"] == pngs.MODEL
    assert sorted(about["made_of"]) == [
        "clip.state.safetensors", "state.safetensors", "vit.state.safetensors",
    ]  # fmt: skip
    operators = [about["made_of"][name]["operator"] for name in sorted(about["made_of"])]
    assert operators == ["train", "blend", "train"]


def test_weights_of_the_second_network_are_looked_for_behind_a_comma(
    on_clip: Made, tmp_path: Path
) -> None:
    loading._kept.cache_clear()
    folder, place = on_clip.model("promptfusion"), on_clip.folder / "vit.st"
    place.rename(tmp_path / "moved.st")
    try:
        with pytest.raises(ConfigError, match=r"vit\.st: not found.*WEIGHTS, behind a comma$"):
            serving.Predictor(folder)
        assert serving.Predictor(folder, weights=f",{tmp_path}/moved.st").classes
        loading._kept.cache_clear()
        with pytest.raises(IncompatibleError, match="does not fit"):
            serving.Predictor(folder, weights=f"{tmp_path}/moved.st,")
    finally:
        (tmp_path / "moved.st").rename(place)


def test_a_second_network_elsewhere_is_the_same_model(on_clip: Made) -> None:
    run = on_clip.run("promptfusion")
    assert run.served is not None and run.served.beside is not None
    known = served_model.model_identity(on_clip.plan, run)

    def with_backbone(**changes: Any) -> str | None:
        beside = run.served and run.served.beside
        assert run.served and beside
        other = replace(beside, backbone=replace(beside.backbone, **changes))
        changed = replace(run, served=replace(run.served, beside=other))
        return served_model.model_identity(on_clip.plan, changed)

    assert with_backbone(weights="elsewhere.st") == known
    assert with_backbone(fingerprint="0" * 64) != known


@pytest.mark.parametrize("label", ["esn", "magmax_independent"])
def test_tasks_that_were_joined(on_vit: Made, label: str) -> None:
    about = check(on_vit, label)
    assert about["made_of"]["state.safetensors"]["operator"] == "join"


def test_a_merge_is_a_learner_of_what_it_merged(on_vit: Made) -> None:
    about = check(on_vit, "ties")
    assert about["predictor"]["method"]["name"] == "finetune"
    assert about["made_of"]["state.safetensors"]["operator"] == "merge"


@pytest.mark.parametrize(
    ("backbone", "label", "kinds"),
    [
        ("on_clip", "prob", ["fitted", "fused"]),
        ("on_vit", "votes", ["fitted", "trained", "fitted"]),
        ("on_vit", "routed", ["trained", "trained"]),
    ],
)
def test_an_ensemble_holds_its_models(
    backbone: str, label: str, kinds: list[str], request: pytest.FixtureRequest
) -> None:
    about = check(request.getfixturevalue(backbone), label)
    predictor = about["predictor"]
    assert predictor["kind"] == "ensemble"
    assert [member["kind"] for member in predictor["members"]] == kinds
    assert ("beside" in about) == ("fused" in kinds)


def test_members_share_the_frozen_features_of_a_batch(
    on_vit: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, embedder = [], loading.embedder

    def counting(*given: Any) -> Any:
        embed = embedder(*given)
        return lambda images: (rows.append(len(images)), embed(images))[1]

    monkeypatch.setattr(loading, "embedder", counting)
    predictor = serving.Predictor(on_vit.model("votes"))
    batch, images = forward.PLAIN_BATCH["cpu"], on_vit.images("votes")
    first, second = predictor.logits(images[:1]), predictor.logits(images[1:2])
    assert rows == [batch, batch]
    assert torch.equal(torch.cat([first, second]), predictor.logits(images)[:2])


def test_only_what_trained_no_network_counts_as_fitted(on_vit: Made) -> None:
    spec = str(on_vit.folder / "spec.yaml")
    names = f"dataset.classes={json.dumps(NAMES)}"
    both = [{"vote": {"of": ["slda", of], "name": of + " too"}} for of in ("simplecil", "esn")]
    ensembles = f"ensemble={json.dumps(both)}"
    methods = "methods=[simplecil, slda, {finetune: {epochs: 1}}, {esn: {epochs: 1}}]"
    chosen = [names, methods, ensembles, "tracking.models=fitted"]
    plan = make_plan(load_resolved(spec, chosen), on_vit.store.memo)
    found = [run.method.label for run in plan.runs if served_model.model_identity(plan, run)]
    assert found == ["simplecil", "slda", "simplecil too"]


def test_an_ensemble_with_a_vote_over_the_test_batch_is_no_model(on_vit: Made) -> None:
    spec = str(on_vit.folder / "spec.yaml")
    l2p = {"l2p": {**STEPS, "eval_selection": "batch_vote"}}
    entry = {"vote": {"of": ["simplecil", "l2p"], "name": "voted"}}
    chosen = [
        f"methods={json.dumps(['simplecil', l2p])}", f"ensemble={json.dumps([entry])}", "merge=[]",
    ]  # fmt: skip
    plan = make_plan(load_resolved(spec, chosen), on_vit.store.memo)
    assert [run.served is None for run in plan.runs] == [False, True, True]
