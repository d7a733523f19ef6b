"""Methods on CLIP through planning and the store: text features, names, reference, networks."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from graftwork.methods.networks.clip import class_texts, cosines
from graftwork.operators.backbones import clip, loading
from graftwork.operators.errors import BadDataError, ConfigError
from graftwork.operators.formats import features
from graftwork.operators.stages import text
from graftwork.operators.store import Store
from graftwork.operators.streams.scenario import class_order
from graftwork.pipelines.planning.plan import Plan
from tests import pngs
from tests.pngs import compute, of

NAMES = ["zebra", "aquarium_fish", "cat", "dog", "emu", "fox"]
MICRO = "open_clip:clip_micro_32"
BACKBONE: dict[str, Any] = {
    "model": MICRO,
    "weights": "random",
    "preprocessing": {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
}
COOP = {"coop": {"epochs": 1, "batch_size": 4, "context_length": 2, "augmentation": "none"}}
ZSCL = {"zscl": {"lr": 1e-3, "batch_size": 4, "warmup": 1, "average_every": 1}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pngs.data(tmp_path_factory.mktemp("data"), pngs.rows(2, 0), pngs.rows(1, 5000))


def plan(store: Store, folder: Path, *overrides: str, **sections: Any) -> Plan:
    given = {"backbone": BACKBONE, "methods": ["zs_clip"], **sections}
    return pngs.plan(store, folder, f"dataset.classes={json.dumps(NAMES)}", *overrides, **given)


def reference(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "images": str(folder / "test.parquet"),
        "texts": ["a river", "snow", "a road"],
        "limit_per_class": 1,
        **more,
    }


def keys(made: Plan, operator: str) -> list[str]:
    return [stage.key for stage in of(made, operator)]


def test_zero_shot_scores_are_those_of_both_towers(store: Store, folder: Path) -> None:
    templates = ["a photo of a {}.", "the {}"]
    made = plan(store, folder, f"text.templates={json.dumps(templates)}")
    compute(made.stages, store)
    network: Any = loading.load(MICRO, "random", "token")
    [stage] = of(made, "text")
    stored = load_tensors(store.read("text", stage.key, "text.safetensors"))["features"]
    assert stored.shape == (2, 6, 32)
    with torch.no_grad():
        first = network.text(network.tokenise(["a photo of a aquarium fish."]))
        texts = class_texts(network, NAMES, templates)
    assert torch.allclose(stored[0, 1], first[0], atol=1e-5)
    [run] = made.runs
    shards = [features.shard(store, s.operator, s.key) for s in run.evaluate.reads["features"]]
    images = torch.from_numpy(np.concatenate(shards).astype("float32"))
    # Rows stand task by task, within one in the data set's order; columns by arrival.
    labels = made.data.sources[0].test.labels.tolist()
    learned = class_order(6, 1993)
    place = [learned.index(label) for label in labels]
    order = sorted(range(len(labels)), key=lambda row: (place[row] // 2, row))
    expected = cosines(images, texts)[order][:, list(learned)].argmax(dim=1)
    data = store.read("evaluate", run.evaluate.key, "predictions.parquet")
    table = pq.read_table(io.BytesIO(data)).to_pydict()
    rows = [i for i, task in enumerate(table["task_trained"]) if task == 2]
    assert [table["predicted"][i] for i in rows] == expected.tolist()
    assert [table["label"][i] for i in rows] == [place[row] for row in order]


def test_keys_of_a_tower_depend_on_that_tower(store: Store, folder: Path, tmp_path: Path) -> None:
    def with_weights(**changes: torch.Tensor) -> Plan:
        path = tmp_path / "weights.safetensors"
        state = dict(clip.build(MICRO).model.state_dict())
        save_file(state | changes, path)
        return plan(store, folder, f"backbone.weights={path}", methods=["zs_clip", COOP])

    start = with_weights()
    other_text = with_weights(**{"ln_final.bias": torch.ones(32)})
    other_image = with_weights(**{"visual.ln_post.bias": torch.ones(48)})
    changed = {
        what: {o for o in ("features", "text", "fit", "train") if keys(start, o) != keys(made, o)}
        for what, made in (("text", other_text), ("image", other_image))
    }
    assert changed == {"text": {"text", "fit", "train"}, "image": {"features", "fit", "train"}}


def test_names_and_templates_are_in_the_keys_of_what_reads_them_alone(
    store: Store, folder: Path
) -> None:
    given = {"methods": ["simplecil", "zs_clip", COOP]}
    start = plan(store, folder, **given)
    renamed = pngs.plan(
        store,
        folder,
        f"dataset.classes={json.dumps(['horse', *NAMES[1:]])}",
        backbone=BACKBONE,
        **given,
    )
    said = plan(store, folder, "text.templates=['the {}']", **given)
    for made in (renamed, said):
        assert keys(start, "features") == keys(made, "features")
        assert keys(start, "text") != keys(made, "text")
        assert keys(start, "train") != keys(made, "train")
        fits = [[run.model.key for run in p.runs[:2]] for p in (start, made)]
        assert fits[0][0] == fits[1][0]
        assert fits[0][1] != fits[1][1]
    for number, stage in enumerate(of(start, "train")):
        learned = class_order(6, 1993)[: 2 * number + 2]
        assert stage.parameters["task"]["names"] == [NAMES[c] for c in learned]
    assert of(start, "train")[-1].parameters["task"]["names"] != NAMES


def test_keys_on_vits_have_nothing_of_this(store: Store, folder: Path) -> None:
    made = pngs.plan(store, folder, methods=["simplecil", {"finetune": {"epochs": 1}}])
    assert of(made, "text") == []
    for stage in [*of(made, "train"), *of(made, "fit")]:
        assert not {"text", "reference"} & {*stage.inputs, *stage.reads}
        assert "texts" not in stage.parameters
    assert set(of(made, "train")[0].parameters["task"]) == {*("index", "current", "before", "seen")}


def test_trained_methods_go_through_the_store(store: Store, folder: Path) -> None:
    made = plan(store, folder, methods=[COOP, ZSCL], reference=reference(folder))
    compute(made.stages, store)
    coop, zscl = made.runs
    assert "reference" not in coop.own[0].inputs
    assert zscl.own[0].parameters["reference"] == ["a river", "snow", "a road"]
    names = set(load_tensors(store.read("train", coop.model.key, "state.safetensors")))
    assert names == {"context"}
    names = set(load_tensors(store.read("train", zscl.model.key, "state.safetensors")))
    assert {name.split(".")[0] for name in names} == {"vit"}
    facts = store.manifest("train", zscl.own[0].key)["facts"]
    assert facts["images_forwarded"] == 4 + 2 * 4
    assert set(facts["epochs"][0]) == {"loss", "cross_entropy", "distillation"}
    for run in made.runs:
        scores = load_tensors(store.read("predict", run.own[-1].key, "scores.safetensors"))
        assert scores["scores"].shape == (6, 6)
        assert bool(scores["scores"].isfinite().all())


def test_texts_and_images_of_the_reference_are_in_the_key(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    def key(**more: Any) -> str:
        made = plan(store, folder, methods=[ZSCL], reference=reference(folder, **more))
        return keys(made, "train")[0]

    listed = tmp_path / "texts.json"
    listed.write_text('["a river", "snow", "a road"]')
    assert key() == key(texts=str(listed))
    assert len({key(), key(texts=["snow"]), key(limit_per_class=None)}) == 2  # one image a class
    assert key(images=str(folder / "train.parquet")) != key()
    listed.write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"reference.texts: must be a list of texts"):
        key(texts=str(listed))
    with pytest.raises(ConfigError, match=r"reference.texts: .*nowhere.json"):
        key(texts=str(tmp_path / "nowhere.json"))
    with pytest.raises((BadDataError, ConfigError), match=r"reference.images"):
        key(images=str(tmp_path / "nowhere.parquet"))


@pytest.mark.parametrize(
    ("overrides", "sections", "message"),
    [
        ([], {"backbone": {"model": pngs.MODEL, "weights": "random"}}, "zs_clip needs a CLIP"),
        ([], {"methods": ["finetune"]}, "finetune trains a timm ViT, got open_clip:clip_micro_32"),
        ([], {"methods": ["aper_adapter"]}, "aper_adapter trains a timm ViT"),
        (["dataset.classes=null"], {}, "dataset.classes: zs_clip reads the names"),
        ([], {"methods": ["zscl"]}, "reference: zscl distils on images and texts of no task"),
        (["text.templates=['a photo']"], {}, r"text.templates.0: must hold one {}"),
        (["text.templates=['{} and {}']"], {}, r"text.templates.0: must hold one {}"),
        (["text.templates=[]"], {}, "text.templates: must be a list"),
        (["features.pooling=avg"], {}, "pooling: CLIP pools as it was trained"),
        (["backbone.weights=null"], {}, "weights: missing; open_clip:clip_micro_32 needs a file"),
    ],
)
def test_what_does_not_fit_is_refused_while_planning(
    overrides: list[str], sections: dict[str, Any], message: str, store: Store, folder: Path
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        plan(store, folder, *overrides, **sections)
    assert len(str(caught.value).splitlines()) == 1


def test_fine_tuning_without_distillation_needs_no_reference(store: Store, folder: Path) -> None:
    made = plan(store, folder, methods=[{"zscl": {"distillation": 0.0}}])
    assert "reference" not in of(made, "train")[0].inputs


def test_closed_form_methods_work_on_clip(store: Store, folder: Path) -> None:
    made = plan(store, folder, methods=["simplecil"])
    compute(made.stages, store)
    assert made.backbone.width == 32


def test_a_name_too_long_for_the_tower_is_named(store: Store, folder: Path) -> None:
    names = ["a " * 90, *NAMES[1:]]
    made = plan(store, folder, f"dataset.classes={json.dumps(names)}")
    with pytest.raises(BadDataError, match=r"dataset.classes: text: must have at most 77 tokens"):
        text.run(of(made, "text")[0].assignment(), store)
