"""PromptFusion: prompts that stay, a weighted loss, one weight between two branches."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Task
from graftwork.methods.mixtures.promptfusion import PromptFusion, blend, fit_weight
from graftwork.methods.mixtures.promptfusion_clip import Stabiliser, StabiliserLearner
from graftwork.methods.mixtures.promptfusion_joint import Joint, JointLearner
from graftwork.methods.mixtures.promptfusion_parts import Mask
from graftwork.methods.mixtures.promptfusion_vit import Booster, BoosterLearner
from graftwork.methods.networks.clip import unit
from graftwork.operators.data import sources
from graftwork.operators.errors import ConfigError
from graftwork.operators.formats import features
from graftwork.operators.serving import predictor as serving
from graftwork.operators.store import Store
from graftwork.operators.training import batches, loop, settings
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.running import served_model
from tests import pngs, tiny
from tests.bounds import rounding
from tests.pngs import compute, of
from tests.test_text import BACKBONE, NAMES

CLIP = Stabiliser(epochs=1, batch_size=4, context_length=3, image_prompt_length=2, lr=0.05)
VIT = Booster(epochs=1, batch_size=4, vit_prompt_length=2, lr=0.05)


def task(index: int) -> Task:
    return dataclasses.replace(tiny.task(index), names=tiny.NAMES[: 3 * index + 3])


def stabiliser(index: int = 0, **changes: Any) -> StabiliserLearner:
    torch.manual_seed(index)
    return dataclasses.replace(CLIP, **changes).learner(tiny.clip(), task(index))


def booster(index: int = 0, **changes: Any) -> BoosterLearner:
    torch.manual_seed(index)
    return dataclasses.replace(VIT, **changes).learner(tiny.vit(2), task(index))


# --- the blend --------------------------------------------------------------------------------


def test_at_infinity_one_branch_decides_alone() -> None:
    images = tiny.images(task(0)).pixels
    with torch.no_grad():
        clip, vit = stabiliser().logits(images, None), booster().logits(images, None)
        assert torch.equal(blend(clip, vit, torch.tensor(-torch.inf)), clip)
        assert torch.equal(blend(clip, vit, torch.tensor(torch.inf)), vit)
        share = torch.tensor(1.0).sigmoid()
        assert float(share) == pytest.approx(0.731, abs=1e-3)
        assert torch.equal(blend(clip, vit, torch.ones(1)), (1 - share) * clip + share * vit)


def test_the_fitted_weight_has_the_least_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    clip, vit = (3 * torch.randn(200, 5, generator=generator) for _ in range(2))
    noise = torch.randn(200, 5, generator=generator)
    targets = (0.7 * clip + 0.3 * vit + noise).argmax(1)
    found = fit_weight(clip, vit, targets)
    shares = torch.linspace(0.001, 0.999, 999).logit()
    losses = torch.stack([F.cross_entropy(blend(clip, vit, s), targets) for s in shares])
    best = float(shares[losses.argmin()].sigmoid())
    assert float(found.sigmoid()) == pytest.approx(best, abs=1e-3)
    assert 0.05 < best < 0.95
    assert found.shape == (1,)
    # A branch that knows everything against one that is always wrong, both ways.
    right = 10 * F.one_hot(targets, 5).float()
    assert float(fit_weight(right, -right, targets).sigmoid()) == pytest.approx(1e-6, rel=1e-3)
    assert float(fit_weight(-right, right, targets).sigmoid()) > 0.999998


# --- the mask ---------------------------------------------------------------------------------


def test_weights_of_one_are_plain_cross_entropy() -> None:
    scores, targets = torch.randn(5, 6), torch.tensor([0, 5, 3, 1, 4])
    plain = F.cross_entropy(scores, targets)
    torch.testing.assert_close(Mask(task(0), 1).loss(scores[:, :3], targets % 3),
                               F.cross_entropy(scores[:, :3], targets % 3))  # fmt: skip
    mask = Mask(dataclasses.replace(task(1), index=2), 1)  # theta 1
    mask.raw.data.fill_(torch.inf)
    assert torch.equal(mask(5).detach(), torch.ones(1, 6))
    torch.testing.assert_close(mask.loss(scores, targets), plain)


def test_a_row_is_weighted_by_its_class() -> None:
    mask, scores, targets = Mask(task(1), 1), torch.randn(5, 6), torch.tensor([0, 5, 3, 1, 4])
    raw = torch.randn(6)
    mask.raw.data.copy_(raw[:, None])
    weight = torch.cat([0.5 / raw[:3].sigmoid(), raw[3:].sigmoid()])
    expected = (weight[targets] * F.cross_entropy(scores, targets, reduction="none")).mean()
    torch.testing.assert_close(mask.loss(scores, targets), expected)
    mask.loss(scores, targets).backward()
    gradient = mask.raw.grad
    assert gradient is not None
    assert bool((gradient[[0, 1]] < 0).all())  # beta goes up
    assert bool((gradient[[3, 4, 5]] > 0).all())  # alpha goes down
    assert float(gradient[2]) == 0  # no row of the class


@pytest.mark.parametrize("legacy", [False, True])
def test_a_last_batch_that_is_smaller_works(legacy: bool) -> None:
    clip, vit = stabiliser(1, legacy_mask=legacy), booster(1, legacy_mask=legacy)
    images = tiny.images(task(1))
    assert clip.mask.raw.shape == (6, 4 if legacy else 1)
    for learner in (clip, vit):
        whole = learner(images.pixels[:4], images.targets[:4], None)["loss"]
        part = learner(images.pixels[:3], images.targets[:3], None)["loss"]
        rest = learner(images.pixels[3:4], images.targets[3:4], None)["loss"]
        torch.testing.assert_close(whole, 0.75 * part + 0.25 * rest)


# --- the branches -----------------------------------------------------------------------------


def trained(method: Any, network: Any, index: int, state: Any) -> dict[str, torch.Tensor]:
    images = tiny.images(task(index))
    if index:
        old = tiny.images(task(0), per_class=1)
        images = tiny.TensorImages(
            torch.cat([images.pixels, old.pixels]),
            torch.cat([images.targets, old.targets]),
            exemplars=torch.arange(15) >= 12,
        )
    found, _ = loop.train_task(
        method, network, task(index), images, state, settings.Settings(seed=0)
    )
    return found


def test_contexts_of_old_classes_stay_to_the_bit_and_their_texts_up_to_rounding() -> None:
    first = trained(CLIP, tiny.clip(), 0, None)
    second = trained(CLIP, tiny.clip(), 1, first)
    assert second.keys() == first.keys() == {"context", "prompt", "mask.raw"}
    assert torch.equal(second["context"][:3], first["context"])
    assert not torch.equal(second["prompt"], first["prompt"])
    start = stabiliser(1).context
    assert (second["context"][3:] - start[3:]).abs().max() > 1e-3
    with torch.no_grad():
        texts = [
            loop.open_learner(CLIP, tiny.clip(), task(index), state, settings.Settings(seed=0))[0]
            .eval()
            .texts()  # type: ignore[operator]
            for index, state in enumerate((first, second))
        ]
    # The tower computes three texts at once here and six there, maybe by other kernels.
    assert (texts[1][:3] - texts[0]).abs().max() <= rounding(width=16, depth=2)
    assert not torch.equal(second["mask.raw"][:3], torch.ones(3, 1))
    assert sum(t.numel() for t in second.values()) == 6 * 3 * 16 + 2 * 48 + 6


def test_texts_with_and_without_gradients_are_the_same() -> None:
    learner = stabiliser(1)
    own = learner.texts()
    own[3:].sum().backward()
    gradient = learner.context.grad
    assert gradient is not None
    assert not gradient[:3].any()
    assert bool(gradient[3:].flatten(1).any(1).all())
    with torch.no_grad():
        torch.testing.assert_close(learner.texts(), own.detach())


def test_without_a_context_texts_are_the_plain_template() -> None:
    learner = stabiliser(1, context_length=0)
    names = [name.replace("_", " ") + "." for name in task(1).names]
    with torch.no_grad():
        expected = unit(learner.network.text(learner.network.tokenise(names)))
        torch.testing.assert_close(learner.texts(), expected)


def test_twice_the_placeholders_stay_behind_the_context_if_asked() -> None:
    plain, double = stabiliser(), stabiliser(legacy_double_x=True)
    ends = [learner._tokens.argmax(dim=1) for learner in (plain, double)]
    assert (ends[1] - ends[0]).tolist() == [3, 3, 3]
    with torch.no_grad():
        assert (plain.texts() - double.texts()).abs().max() > 1e-4
    with pytest.raises(ValueError, match="must have at most 77 tokens"):
        stabiliser(context_length=40, legacy_double_x=True)


def test_the_feature_of_the_vit_is_the_mean_of_the_prompt() -> None:
    learner, images = booster(), tiny.images(task(0)).pixels[:2]
    vit = learner.network
    assert vit.pos_embed is not None
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(images))
        prompt = (learner.prompt + vit.pos_embed[0, :1]).expand(2, 2, -1)
        tokens = torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], dim=1)
        expected = vit.norm(vit.blocks(tokens))[:, 1:3].mean(1)
        torch.testing.assert_close(learner.features(images), expected)


# --- all of it by one loss --------------------------------------------------------------------

JOINT = Joint(
    epochs=2, batch_size=5, context_length=3, image_prompt_length=2, vit_prompt_length=2, lr=0.05
)


@pytest.mark.parametrize("legacy", [False, True])
def test_joint_training_is_the_authors_loop(legacy: bool) -> None:
    """Two tasks by our loop, and by a plain one of the formulas of train_pf.py."""
    method = dataclasses.replace(JOINT, legacy_mask=legacy)
    state: State | None = None
    for number in range(2):
        of, seen = task(number), 3 * number + 3
        images, given = tiny.images(of), settings.Settings(seed=0)
        made, _ = loop.open_learner(method, tiny.pair(), of, state, given)
        assert isinstance(made, JointLearner)
        with torch.no_grad():
            made.mask.raw.fill_(1)
        own = [p for p in made.parameters() if p.requires_grad]
        steps = torch.optim.AdamW(own, lr=0.05, weight_decay=1e-4)
        old = made.stabiliser.context.detach()[: seen - 3].clone()
        for epoch in range(2):
            steps.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * epoch / 2))
            for rows in batches.row_batches(12, method.recipe(of), 0, number, epoch):
                pixels, targets = images.pixels[rows], images.targets[rows]
                clip = made.stabiliser.logits(pixels, None)
                vit = made.booster.head(made.booster.features(pixels))
                share = torch.sigmoid(made.weight)
                logs = ((1 - share) * clip + share * vit).log_softmax(1)
                if number:
                    raw = made.mask.raw.T.sigmoid()
                    weights = torch.cat([0.5 / raw[:, :3], raw[:, 3:]], dim=1)
                    logs = logs * weights[: len(rows) if legacy else 1]
                steps.zero_grad()
                F.nll_loss(logs, targets).backward()
                torch.nn.utils.clip_grad_norm_(own, 1.0)
                steps.step()
                # Contexts of earlier classes are no parameters there.
                with torch.no_grad():
                    made.stabiliser.context[: seen - 3] = old
        state, _ = loop.train_task(method, tiny.pair(), of, images, state, given)
        wanted = {name: p.detach() for name, p in made.named_parameters() if p.requires_grad}
        assert {name for name in state if "mask" not in name} <= wanted.keys()
        for name in state:
            expected = wanted.get(name, made.mask.raw)
            torch.testing.assert_close(state[name], expected, rtol=0, atol=2e-5)
        assert float(state["weight"]) != 1.0


def test_joint_scores_are_the_blend_of_both_branches() -> None:
    torch.manual_seed(0)
    made = JOINT.learner(tiny.pair(), task(0)).eval()
    images = tiny.images(task(0)).pixels
    with torch.no_grad():
        made.weight.fill_(-1.5)
        clip, vit = (part.logits(images, None) for part in (made.stabiliser, made.booster))
        share = 1 / (1 + math.exp(1.5))
        torch.testing.assert_close(made.logits(images, None), (1 - share) * clip + share * vit)


def test_fields_out_of_range_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as caught:
        PromptFusion(epochs=0, batch_size=0, lr=0, weight_decay=-1, exemplars=-1, clip=-1,
                     context_length=-1, image_prompt_length=0, vit_prompt_length=0)  # fmt: skip
    assert len(caught.value.problems) == 9


# --- in a pipeline ----------------------------------------------------------------------------

FUSION = {
    "promptfusion": {
        "epochs": 1, "batch_size": 4, "context_length": 2, "image_prompt_length": 2,
        "vit_prompt_length": 2, "exemplars": 8,
    }
}  # fmt: skip
BESIDE = {
    "model": pngs.MODEL,
    "weights": "random",
    "preprocessing": {"resize": 16, "crop": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pngs.data(tmp_path_factory.mktemp("data"), pngs.rows(3, 0), pngs.rows(1, 5000))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def plan(store: Store, folder: Path, **sections: Any) -> Plan:
    given = {"backbone": BACKBONE, "vit": BESIDE, "methods": [FUSION], **sections}
    given = json.loads(json.dumps(given))  # YAML would write an object that occurs twice as one
    return pngs.plan(store, folder, f"dataset.classes={json.dumps(NAMES)}", **given)


def test_branches_are_two_chains_and_the_blend_is_theirs(store: Store, folder: Path) -> None:
    made = plan(store, folder)
    [run] = made.runs
    chains = {stage.chain for stage in of(made, "train")}
    assert len(chains) == 2
    # Of two classes of each of the first two tasks, for both branches.
    assert len(of(made, "exemplars")) == 4
    for stage in of(made, "train"):
        assert stage.reads["exemplars"] == tuple(of(made, "exemplars"))
    for name, stages in (
        ("clip", run.evaluate.inputs["model"]),
        ("vit", run.evaluate.inputs["beside"]),
    ):
        assert [stage.parameters["method"]["name"] for stage in stages] == [
            f"promptfusion_{name}"
        ] * 3
        assert stages[1].inputs["previous"] == stages[:1]
        assert ("names" in stages[0].parameters["task"]) == (name == "clip")
    preprocessing = {s.chain: s.parameters["preprocessing"]["crop"] for s in of(made, "train")}
    assert sorted(preprocessing.values()) == [16, 32]

    compute(made.stages, store)
    expected = torch.empty(0)
    for number, stage in enumerate(run.evaluate.inputs["predictions"]):
        assert stage.operator == "blend"
        parts = {
            role: load_tensors(store.read(inputs[0].operator, inputs[0].key, "scores.safetensors"))
            for role, inputs in stage.inputs.items()
            if role != "dataset"
        }
        known = (number + 1) * 2
        assert parts["clip"]["scores"].shape == (6 + [0, 2 * 3, 4 * 2][number], known)
        weight = fit_weight(
            parts["clip"]["scores"], parts["vit"]["scores"], parts["clip"]["targets"]
        )
        stored = load_tensors(store.read("blend", stage.key, "state.safetensors"))
        assert torch.equal(stored["weight"], weight)
        scores = load_tensors(store.read("blend", stage.key, "scores.safetensors"))
        expected = blend(parts["clip_test"]["scores"], parts["vit_test"]["scores"], weight)
        torch.testing.assert_close(scores["scores"], expected)
        assert scores.keys() == parts["vit_test"].keys() == {"scores"}
    data = store.read("evaluate", run.evaluate.key, "predictions.parquet")
    table = pq.read_table(io.BytesIO(data)).to_pydict()
    last = [p for p, t in zip(table["predicted"], table["task_trained"], strict=True) if t == 2]
    assert last == expected.argmax(1).tolist()
    facts = store.manifest("evaluate", run.evaluate.key)["facts"]
    sizes = [
        sum(
            t.numel() * 4
            for t in load_tensors(store.read("train", s[-1].key, "state.safetensors")).values()
        )
        for s in (run.evaluate.inputs["model"], run.evaluate.inputs["beside"])
    ]
    assert facts["state_bytes"] == sum(sizes)
    assert len(facts["training"]) == 6
    assert all(done.reused for done in compute(made.stages, store))


def test_joint_training_is_one_chain_on_both_networks(store: Store, folder: Path) -> None:
    fusion = {"promptfusion": {**FUSION["promptfusion"], "training": "joint"}}
    beside = {**BESIDE, "image_size": 32, "preprocessing": BACKBONE["preprocessing"]}
    made = plan(store, folder, vit=beside, methods=[fusion])
    [run] = made.runs
    training = of(made, "train")
    assert len(training) == 3 and len({stage.chain for stage in training}) == 1
    assert {stage.operator for stage in run.own} == {"train", "predict"}
    for stage in training:
        assert stage.parameters["method"]["name"] == "promptfusion_joint"
        assert stage.parameters["beside"]["architecture"] == pngs.MODEL
        assert stage.parameters["task"]["names"]
        assert stage.parameters["preprocessing"]["crop"] == 32
    # The exemplars are those of the branches apart, and so are their keys.
    apart = plan(store, folder)
    assert of(apart, "exemplars") == of(made, "exemplars")
    assert "training" not in apart.runs[0].method.hyperparameters
    compute(made.stages, store)
    summary = store.manifest("evaluate", run.evaluate.key)["facts"]
    assert len(summary["training"]) == 3
    state = load_tensors(store.read("train", training[-1].key, "state.safetensors"))
    assert {"weight", "mask.raw", "booster.head.weight", "stabiliser.context"} <= state.keys()
    # As it is served: both networks are given the image as CLIP sees it.
    for name, content in served_model.model(made, store, run).items():
        place = folder / "model" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        content(place) if callable(content) else place.write_text(str(content))
    model = serving.Predictor(folder / "model" / "model" / "data")
    images = pq.read_table(folder / "test.parquet")["image"].to_pylist()
    labels, ids = made.data.sources[0].test.labels.tolist(), run.stream.ids
    tasks = [ids[:2], ids[2:4], ids[4:]]
    rows = [row for own in tasks for row, label in enumerate(labels) if label in own]
    last = run.evaluate.inputs["predictions"][-1]
    stored = load_tensors(store.read("predict", last.key, "scores.safetensors"))["scores"]
    torch.testing.assert_close(model.logits([images[row] for row in rows]), stored)


def test_joint_training_needs_images_of_one_size(store: Store, folder: Path) -> None:
    fusion = {"promptfusion": {**FUSION["promptfusion"], "training": "joint"}}
    with pytest.raises(ConfigError, match=r"vit\.model: takes images of 16 .*image_size: 32"):
        plan(store, folder, methods=[fusion])


def test_a_second_network_is_asked_for_and_must_be_a_vit(store: Store, folder: Path) -> None:
    with pytest.raises(ConfigError, match="vit: promptfusion has a branch on a ViT"):
        plan(store, folder, vit=None)
    with pytest.raises(ConfigError, match=r"vit\.model: promptfusion trains a timm ViT, got open"):
        plan(store, folder, vit=BACKBONE)


def test_proof_needs_no_image_once_features_are_stored(store: Store, folder: Path) -> None:
    """From planning to predictions; afterwards the images may be gone."""
    proof = {"proof": {"epochs": 1, "batch_size": 4, "exemplars": 8}}
    made = plan(store, folder, vit=None, methods=[proof])
    [run] = made.runs
    before = [s for s in made.stages if s.operator not in ("train", "predict", "evaluate")]
    compute(before, store)
    trained = (*of(made, "train"), *of(made, "predict"))
    assert [sources.count(stage.hints["places"]) for stage in trained] == [0] * 6
    done = compute([s for s in made.stages if s not in before], store)
    facts = {d.key: d.facts for d in done}
    assert [facts[s.key]["exemplars"] for s in of(made, "train")] == [0, 6, 8]
    [state] = [load_tensors(store.read("train", of(made, "train")[2].key, "state.safetensors"))]
    assert state["fusion.counts"].tolist() == [3.0] * 6
    rows = np.flatnonzero(made.data.sources[0].train.labels == run.stream.ids[0])
    split = [s for s in of(made, "features") if s.label.startswith("features train ")]
    stored = np.concatenate([features.shard(store, s.operator, s.key) for s in split])
    mean = F.normalize(torch.from_numpy(stored[rows].astype(np.float32)), dim=1).mean(0)
    torch.testing.assert_close(state["fusion.prototypes"][0], mean)
