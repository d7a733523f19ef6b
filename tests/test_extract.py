"""Extraction: a feature is a function of its image, the weights and the preprocessing alone."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

from graftwork.operators.backbones import loading, resolve, weights
from graftwork.operators.data import digits
from graftwork.operators.errors import BadDataError, ConfigError, DamagedStage, IncompatibleError
from graftwork.operators.formats import features
from graftwork.operators.images import preprocessing
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.hints import Selection
from graftwork.operators.stage import Resources, Stage
from graftwork.operators.stages import features as extract
from graftwork.operators.store import Store

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
PREPROCESSING = Preprocessing(resize=36, crop=32, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))


def png(seed: int, size: tuple[int, int] = (20, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


GOLDEN, GOLDEN_NORM = [-0.27797, 1.78201, -2.83897, 0.52465, 1.05005], 34.79275
IMAGES = [png(seed) for seed in range(21)]


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3,
        num_classes=0,
    )  # fmt: skip
    return vit.eval().requires_grad_(False)


def embed(network: Any) -> Any:
    return loading.embedder(network, "token")


def plain_features(network: Any) -> torch.Tensor:
    """The same features by timm and torchvision alone, one image at a time."""
    transform = v2.Compose(
        [
            v2.Resize(36, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5, 0.4, 0.3], [0.5, 0.6, 0.7]),
        ]
    )
    with torch.inference_mode():
        return torch.cat(
            [
                network.forward_features(transform(Image.open(io.BytesIO(i)).convert("RGB"))[None])[
                    :, 0
                ]
                for i in IMAGES
            ]
        )


def test_features_equal_timm_and_torchvision(network: Any) -> None:
    ours = extract.extract(IMAGES, embed(network), PREPROCESSING, batch_size=8)
    # One image at a time, timm may pick other kernels: equal to float32 rounding.
    assert torch.allclose(ours, plain_features(network), rtol=0, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", [1, 5, 16, 64])
def test_neither_order_nor_batch_size_changes_a_feature(
    network: Any, batch_size: int, precision: str
) -> None:
    reference = extract.extract(
        IMAGES, embed(network), PREPROCESSING, batch_size=8, precision=precision
    )
    shuffled = list(range(len(IMAGES)))
    random.Random(batch_size).shuffle(shuffled)
    found = extract.extract(
        [IMAGES[i] for i in shuffled],
        embed(network),
        PREPROCESSING,
        batch_size=batch_size,
        workers=2,
        precision=precision,
    )
    assert torch.equal(found, reference[shuffled])


def test_low_precision_is_near_full_precision(network: Any) -> None:
    full = extract.extract(IMAGES, embed(network), PREPROCESSING)
    for precision in ("bf16", "fp16"):
        low = extract.extract(IMAGES, embed(network), PREPROCESSING, precision=precision)
        assert not torch.equal(low, full)
        assert torch.nn.functional.cosine_similarity(low, full).min() > 0.999


def test_average_pooling_is_the_mean_of_the_patch_tokens(network: Any) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    tokens = network.forward_features(pixels)
    found = loading.pooled_features(network, pixels, "avg")
    assert torch.allclose(found, tokens[:, 1:].mean(1))


def test_a_broken_image_is_named_not_skipped(network: Any) -> None:
    with pytest.raises(BadDataError):
        extract.extract([*IMAGES[:3], IMAGES[3][:200]], embed(network), PREPROCESSING)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shards_round_trip(dtype: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(37, 12)).astype(dtype)
    found = features.decode_shard(features.encode_shard(matrix))
    assert found.dtype == matrix.dtype
    assert np.array_equal(found, matrix)


def test_a_shard_with_another_schema_is_refused() -> None:
    def written(table: pa.Table) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(6, np.float32)), 3)
    good = pa.table({"sample": pa.array([0, 1]), "feature": vectors})
    assert features.decode_shard(written(good)).shape == (2, 3)
    for table in (
        pa.table({"sample": pa.array([0, 1])}),
        good.append_column("label", pa.array([0, 1])),
        pa.table({"sample": pa.array([0, 1], pa.int32()), "feature": vectors}),
        pa.table({"sample": pa.array([1, 0]), "feature": vectors}),
        pa.table({"sample": pa.array([0, 1]), "feature": pa.array([[1.0], [2.0]])}),
    ):
        with pytest.raises(ValueError):
            features.decode_shard(written(table))
    with pytest.raises(ValueError):
        features.decode_shard(written(good)[:-20])


def test_a_file_that_begins_like_a_pickle_is_read_for_what_it_is(tmp_path: Path) -> None:
    path, given = tmp_path / "weights.safetensors", {"a": torch.arange(3.0)}
    for length in range(300):
        save_file(given, path, {"note": "x" * length})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert torch.equal(weights.read_weights(str(path))["a"], given["a"])


def test_weights_are_loaded_strictly(tmp_path: Path, network: Any) -> None:
    model = timm.create_model(TINY, num_classes=10)
    sound = {k: v for k, v in model.state_dict().items()}
    save_file(sound, tmp_path / "sound.safetensors")
    loaded = loading.load(TINY, str(tmp_path / "sound.safetensors"), "token")
    # The classifier is dropped, everything else is loaded.
    assert torch.equal(loaded.state_dict()["norm.weight"], sound["norm.weight"])
    torch.save({"state_dict": sound}, tmp_path / "sound.pth")
    assert weights.fingerprint(loading.load(TINY, str(tmp_path / "sound.pth"), "token")) == (
        weights.fingerprint(loaded)
    )

    missing = {k: v for k, v in sound.items() if k != "blocks.0.attn.qkv.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(IncompatibleError, match=r"blocks.0.attn.qkv.weight \[576, 192\], file has"):
        loading.load(TINY, str(tmp_path / "missing.safetensors"), "token")
    whole = (tmp_path / "sound.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IncompatibleError, match="truncated: its header expects"):
        loading.load(TINY, str(tmp_path / "short.safetensors"), "token")
    with pytest.raises(ConfigError, match="not found"):
        loading.load(TINY, str(tmp_path / "absent.safetensors"), "token")
    with pytest.raises(ConfigError, match='did you mean "vit_tiny_patch16_224"'):
        loading.load("vit_tinny_patch16_224", "random", "token")
    with pytest.raises(IncompatibleError, match="no class token"):
        loading.load("resnet18", "random", "token")


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Code()}, tmp_path / "code.pth")
    with pytest.raises(IncompatibleError, match="code"):
        loading.load(TINY, str(tmp_path / "code.pth"), "token")
    assert not (tmp_path / "executed").exists()


def test_fingerprint_sees_one_changed_weight(network: Any) -> None:
    before = weights.fingerprint(network)
    with torch.no_grad():
        network.blocks[0].attn.qkv.weight[0, 0] += 1e-6
        assert weights.fingerprint(network) != before
        network.blocks[0].attn.qkv.weight[0, 0] -= 1e-6


def test_resolving_a_backbone_again_needs_no_model(tmp_path: Path) -> None:
    memo = Store(str(tmp_path)).memo
    first = resolve.resolve("vit_micro_patch4_32", "builtin", "token", memo)
    backbone_load, loading.load = loading.load, None  # type: ignore[assignment]
    try:
        assert resolve.resolve("vit_micro_patch4_32", "builtin", "token", memo) == first
    finally:
        loading.load = backbone_load
    assert first.fingerprint == weights.fingerprint(
        loading.load("vit_micro_patch4_32", first.weights, "token")
    )


def test_the_shipped_backbone_gives_the_features_that_it_gave(tmp_path: Path) -> None:
    """A change of any library that moves features must raise the operator's version."""
    memo = Store(str(tmp_path)).memo
    found = resolve.resolve("vit_micro_patch4_32", "builtin", "token", memo)
    shipped = loading.load(found.model, found.weights, "token")
    digit = next(iter(digits.images("train")))
    [row] = extract.extract([digit], embed(shipped), preprocessing.PRESETS["micro_32"])
    # Written down from a run; CPUs differ in the last bits.
    assert torch.allclose(row[:5], torch.tensor(GOLDEN), atol=2e-4), row[:5].tolist()
    assert float(row.norm()) == pytest.approx(GOLDEN_NORM, abs=1e-3)


def test_a_vit_at_another_size_has_resampled_position_embeddings(tmp_path: Path) -> None:
    memo = Store(str(tmp_path)).memo
    own = resolve.resolve("vit_micro_patch4_32", "builtin", "token", memo)
    small = resolve.resolve("vit_micro_patch4_32", "builtin", "token", memo, 16)
    assert small.fingerprint != own.fingerprint
    assert (own.data_config["input_size"], small.data_config["input_size"]) == (
        [3, 32, 32],
        [3, 16, 16],
    )
    large = loading.load("vit_micro_patch4_32", own.weights, "token").state_dict()
    found = loading.load("vit_micro_patch4_32", own.weights, "token", 16).state_dict()
    table = large["pos_embed"]
    grid = table[:, 1:].reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
    halved = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True)
    assert torch.equal(found["pos_embed"][:, :1], table[:, :1])
    assert torch.allclose(
        found["pos_embed"][:, 1:], halved.permute(0, 2, 3, 1).reshape(1, 16, -1), atol=1e-6
    )
    assert all(torch.equal(found[n], large[n]) for n in large if n != "pos_embed")


def test_a_backbone_without_position_embeddings_has_one_size() -> None:
    with pytest.raises(IncompatibleError, match=r"image_size: resnet18 cannot be had for .* 64"):
        loading.load("resnet18", "random", "avg", 64)


def test_the_operator_refuses_images_that_changed(tmp_path: Path) -> None:
    paths = []
    for number, image in enumerate(IMAGES[:3]):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(image)
    store = Store(str(tmp_path / "store"))
    found = resolve.resolve("vit_micro_patch4_32", "builtin", "token", store.memo)
    stage = Stage(
        operator="features",
        parameters={
            "images": "0" * 64,
            "architecture": "vit_micro_patch4_32",
            "backbone": found.fingerprint,
            "preprocessing": Preprocessing(resize=32, crop=32).to_json(),
            "pooling": "token",
            "dtype": "float16",
            "numerics": {"device": "cpu", "precision": "fp32", "torch": "x"},
        },
        hints={
            "pooling": "token",
            "image_size": None,
            "images": 3,
            "places": {"kind": "files", "files": [str(p) for p in paths]},
            "model": found.model,
            "weights": found.weights,
            "batch_size": None,
            "cpus": 1,
            "max_pixels": None,
            "selection": to_json(Selection()),
        },
        resources=Resources(),
        label="features train 1/1",
    )
    with pytest.raises(BadDataError, match="changed since they were indexed"):
        extract.run(stage.assignment(), store)


def test_a_damaged_shard_is_reported_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(DamagedStage, match=r"manifest\.json is missing"):
        features.shard(Store(str(tmp_path)), "features", "0" * 64)
