"""Training images of a task: what was indexed, and the same pixels however they are asked for."""

import gc
import hashlib
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.errors import BadDataError
from graftwork.operators.images import codec, pixels
from graftwork.operators.images.augmentation import AUGMENTATIONS, augment, generator
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.training.rows import TaskRows
from tests.pngs import png
from tests.test_images import decode

PREPROCESSING = Preprocessing(resize=20, crop=18, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
SIZES = [(16, 16), (31, 20), (20, 33), (18, 18), (64, 9)]
IMAGES = [png(seed, SIZES[seed % 5]) for seed in range(15)]
EVERY = list(range(len(IMAGES)))


def index_of(images: Iterable[bytes]) -> SplitIndex:
    hashes = b"".join(hashlib.sha256(image).digest() for image in images)
    digests = np.frombuffer(hashes, np.uint8).reshape(-1, 32)
    none = np.zeros(len(digests), np.int32)
    return SplitIndex(digests=digests, labels=none, domains=none)


def opened(
    given: Iterable[bytes] = IMAGES,
    indexed: Iterable[bytes] = IMAGES,
    query: Tensor | None = None,
    **changes: Any,
) -> TaskRows:
    index = index_of(indexed)
    count = len(index.labels)
    return TaskRows(
        given,
        digests=index.digests,
        samples=index.sample_ids(),
        targets=torch.arange(count),
        query=query,
        **{
            "name": lambda row: f"picture {row}",
            "preprocessing": PREPROCESSING,
            "seed": 3,
            **changes,
        },
    )


# --- what was indexed -------------------------------------------------------------------------


def altered(*rows: int) -> list[bytes]:
    return [image + b"!" if row in rows else image for row, image in enumerate(IMAGES)]


@pytest.mark.parametrize(("rows", "first"), [((0,), 0), ((14,), 14), ((9, 4, 11), 4)])
def test_the_first_image_that_changed_is_named(rows: tuple[int, ...], first: int) -> None:
    with pytest.raises(BadDataError) as caught:
        opened(altered(*rows))
    assert str(caught.value) == f"image picture {first} changed since it was indexed; run again"


def test_the_same_images_in_another_order_are_not_what_was_indexed() -> None:
    swapped = [IMAGES[1], IMAGES[0], *IMAGES[2:]]
    with pytest.raises(BadDataError, match="picture 0 changed"):
        opened(swapped)


def test_images_are_read_once_and_one_after_the_other() -> None:
    asked: list[int] = []

    def source() -> Iterable[bytes]:
        for row, image in enumerate(IMAGES):
            asked.append(row)
            yield image

    rows = opened(source())
    for epoch in range(2):
        rows.batch(EVERY, epoch, "lamda")
    assert asked == EVERY


def test_nothing_is_left_open(recwarn: pytest.WarningsRecorder) -> None:
    rows = opened()
    file = rows._file
    del rows
    gc.collect()
    assert file.closed
    assert not recwarn.list


# --- pixels -----------------------------------------------------------------------------------


def alone(row: int, epoch: int, name: str, seed: int = 3) -> Tensor:
    """uint8 [3, h, w] of one image, by the functions themselves."""
    value = AUGMENTATIONS[name]
    image = codec.rgb(IMAGES[row])
    if value.scale is None:
        prepared = pixels.prepare([IMAGES[row]], PREPROCESSING)[0]
        image = Image.fromarray(prepared.permute(1, 2, 0).contiguous().numpy())
    sample = int(index_of(IMAGES).sample_ids()[row])
    done = augment(image, 18, value, generator(seed, epoch, sample))
    return torch.from_numpy(np.array(done)).permute(2, 0, 1)


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_pixels_are_those_of_the_image_alone(name: str) -> None:
    rows = opened()
    for epoch in (0, 5):
        found = rows.batch(EVERY, epoch, name)
        assert (found.shape, found.dtype) == ((15, 3, 18, 18), torch.uint8)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, torch.stack([alone(row, epoch, name) for row in EVERY]))


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_neither_batch_nor_order_changes_a_pixel(name: str) -> None:
    rows = opened()
    whole = rows.batch(EVERY, 2, name)
    shuffled = random.Random(0).sample(EVERY, 15)
    parts = [rows.batch(shuffled[start : start + 4], 2, name) for start in range(0, 15, 4)]
    assert torch.equal(torch.cat(parts), whole[shuffled])
    assert torch.equal(rows.batch([7, 7, 1], 2, name), whole[[7, 7, 1]])


def test_the_place_in_the_data_set_changes_no_pixel() -> None:
    """Random numbers follow from an image's bytes: another task, shard or order has the same."""
    reverse = opened(IMAGES[::-1], IMAGES[::-1])
    for name in AUGMENTATIONS:
        found = reverse.batch(EVERY[::-1], 1, name)
        assert torch.equal(found, opened().batch(EVERY, 1, name))


def test_epoch_and_seed_change_augmented_pixels_alone() -> None:
    rows, other = opened(), opened(seed=4)
    for name in AUGMENTATIONS:
        same = name == "none"
        assert torch.equal(rows.batch(EVERY, 0, name), rows.batch(EVERY, 1, name)) is same
        assert torch.equal(rows.batch(EVERY, 0, name), other.batch(EVERY, 0, name)) is same


@pytest.mark.parametrize(
    "preprocessing",
    [
        PREPROCESSING,
        Preprocessing(resize=32, crop=32),
        Preprocessing(resize=24, crop=28, interpolation="bilinear"),
        Preprocessing(crop=16),
    ],
    ids=["shrinks", "grows", "pads", "cuts"],
)
def test_without_augmentation_pixels_are_those_of_features(preprocessing: Preprocessing) -> None:
    rows = opened(preprocessing=preprocessing)
    expected = pixels.prepare(IMAGES, preprocessing)
    assert torch.equal(rows.batch(EVERY, 0, "none"), expected)
    assert torch.equal(
        rows.normalise(rows.batch(EVERY, 9, "none")), pixels.normalise(expected, preprocessing)
    )


def test_flips_are_of_prepared_pixels() -> None:
    rows = opened()
    plain = rows.batch(EVERY, 0, "none")
    either = [rows.batch(EVERY, epoch, "flip") for epoch in range(4)]
    for found in either:
        for image, original in zip(found, plain, strict=True):
            assert torch.equal(image, original) or torch.equal(image, original.flip(2))
    flipped = sum(int((found != plain).flatten(1).any(1).sum()) for found in either)
    assert 15 < flipped < 45  # of 60


def test_without_a_crop_images_of_one_size_are_taken_as_they_are() -> None:
    same = [png(seed, (12, 10)) for seed in range(3)]
    rows = opened(same, same, preprocessing=Preprocessing())
    found = rows.batch([2, 0], 0, "none")
    assert torch.equal(found, torch.stack([decode(same[2]), decode(same[0])]))


def test_targets_and_queries_are_handed_through() -> None:
    query = torch.randn(15, 4)
    rows = opened(query=query)
    assert torch.equal(rows.targets, torch.arange(15))
    assert rows.query is query
    assert rows.name(3) == "picture 3"


# --- images that cannot be used ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (IMAGES[3][:-40], "truncated or damaged"),
        (b"%PDF-1.7", "not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but PDF"),
        (png(99, (40, 41)), "40x41 = 1640 pixels, more than max_pixels 1600"),
    ],
)
@pytest.mark.parametrize("name", ["none", "lamda"])
def test_an_image_that_cannot_be_decoded_is_named(image: bytes, reason: str, name: str) -> None:
    given = [*IMAGES[:3], image, *IMAGES[4:]]
    rows = opened(given, given, max_pixels=1600)
    assert len(rows.batch([2, 4, 14], 0, name)) == 3
    with pytest.raises(BadDataError) as caught:
        rows.batch([2, 3, 14], 0, name)
    message = str(caught.value)
    assert message.startswith("picture 3: ")
    assert reason in message
    assert message.endswith("; mend it, or leave it out with dataset.on_bad_image: skip")
    assert "\n" not in message


# --- threads ----------------------------------------------------------------------------------


def test_threads_that_ask_at_once_get_what_one_gets() -> None:
    rows = opened()
    draw = random.Random(1)
    asked = [
        (
            draw.choices(EVERY, k=draw.randint(1, 6)),
            draw.randint(0, 2),
            draw.choice(["none", "slca"]),
        )
        for _ in range(300)
    ]
    expected = [rows.batch(*one) for one in asked]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: rows.batch(*one), asked))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
