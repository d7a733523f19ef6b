"""The training images of a task, as the training loop asks for them.

Encoded images are read once, checked against the index, and kept in an anonymous temporary file:
every epoch decodes them anew, in any order, and the memory is the operating system's page cache.

Shapes: B batch, N rows of the task, D width, h and w the preprocessed height and width.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from graftwork.operators.data.digests import check_digests
from graftwork.operators.errors import BadDataError
from graftwork.operators.images import codec
from graftwork.operators.images.augmentation import AUGMENTATIONS, augment, generator
from graftwork.operators.images.pixels import normalise, resize_and_crop
from graftwork.operators.images.preprocessing import Preprocessing


class TaskRows:
    """Images, targets and queries of a task; see `operators.training.settings.Images`.

    Args:
        encoded: the encoded images [N], read once.
        digests: uint8 [N, 32], `codec.digest` of each as indexed.
        samples: int64 [N], ids that follow from the images' bytes.
        name: what people call the image at a position.
        targets: int64 [N], columns.
        exemplars: bool [N], which images are of earlier tasks; None for none.
        query: [N, D], frozen features of the images as they are, or None.
        preprocessing: the test transform; its crop is the size of augmented images.
        seed: of the run.
        max_pixels: largest width times height of an image.

    Raises:
        BadDataError: an image is not what was indexed.
    """

    def __init__(
        self,
        encoded: Iterable[bytes],
        *,
        digests: np.ndarray,
        samples: np.ndarray,
        name: Callable[[int], str],
        targets: Tensor,
        exemplars: Tensor | None = None,
        query: Tensor | None,
        preprocessing: Preprocessing,
        seed: int,
        max_pixels: int | None = None,
    ) -> None:
        self.targets, self.query = targets, query
        self.exemplars = none_of(targets) if exemplars is None else exemplars
        self._samples, self.name = samples, name
        self._preprocessing, self._seed, self._max_pixels = preprocessing, seed, max_pixels
        # Lives as long as these rows; it has no name that could be left behind.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        ends, found = [0], []
        for image in encoded:
            self._file.write(image)
            ends.append(ends[-1] + len(image))
            found.append(codec.digest(image))
        self._file.flush()
        self._ends = ends
        hashes = np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32)
        check_digests(digests, hashes, name)

    def batch(self, rows: Sequence[int], epoch: int, augmentation: str) -> Tensor:
        """uint8 [B, 3, h, w] of some rows, channels last in memory.

        Raises:
            BadDataError: an image cannot be decoded; it is named.
        """
        decoded = [self._decoded(row) for row in rows]
        value = AUGMENTATIONS[augmentation]
        if value.scale is None:
            pixels = resize_and_crop(decoded, self._preprocessing)
            if not value.flip and not value.brightness:
                return pixels
            decoded = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
        size = self._preprocessing.crop
        assert size is not None, "augmentation needs a crop size; checked while planning"
        arrays = [
            np.asarray(augment(image, size, value, self._random(row, epoch)))
            for image, row in zip(decoded, rows, strict=True)
        ]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def normalise(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, h, w], on the device of the pixels."""
        return normalise(pixels, self._preprocessing)

    def _random(self, row: int, epoch: int) -> np.random.Generator:
        return generator(self._seed, epoch, int(self._samples[row]))

    def _decoded(self, row: int) -> Image.Image:
        start, end = self._ends[row], self._ends[row + 1]
        # Several threads read at once: no shared position in the file.
        data = os.pread(self._file.fileno(), end - start, start)
        try:
            return codec.rgb(data, self._max_pixels)
        except BadDataError as error:
            raise BadDataError(
                f"{self.name(row)}: {error}; mend it, or leave it out with "
                "dataset.on_bad_image: skip"
            ) from error


class FeatureRows:
    """Rows of a method that reads frozen features alone: no image is opened or decoded.

    Args:
        targets: int64 [N], columns.
        exemplars: bool [N], which rows are of earlier tasks; None for none.
        query: [N, D], frozen features.
        name: what people call the image at a position.
    """

    def __init__(
        self,
        *,
        targets: Tensor,
        exemplars: Tensor | None,
        query: Tensor,
        name: Callable[[int], str],
    ) -> None:
        self.targets, self.name = targets, name
        self.query: Tensor | None = query
        self.exemplars = none_of(targets) if exemplars is None else exemplars

    def batch(self, rows: Sequence[int], epoch: int, augmentation: str) -> Tensor:
        """[B, 0]."""
        return torch.empty(len(rows), 0)

    def normalise(self, pixels: Tensor) -> Tensor:
        """As it is."""
        return pixels


def none_of(targets: Tensor) -> Tensor:
    """Bool [N]: no row is an exemplar."""
    return torch.zeros(len(targets), dtype=torch.bool)


class ReferenceRows:
    """Images and texts of no task; see `methods.contracts.trained.Reference`.

    Args:
        rows: the images.
        texts: the texts.
        device: on which images are handed out.
    """

    def __init__(self, rows: TaskRows, texts: tuple[str, ...], device: str) -> None:
        self.texts = texts
        self._rows, self._device = rows, device

    def __len__(self) -> int:
        return len(self._rows.targets)

    def batch(self, rows: Sequence[int]) -> Tensor:
        """Normalised images [B, 3, h, w] of some rows, as they are, on the device.

        Raises:
            BadDataError: an image cannot be decoded; it is named.
        """
        return self._rows.normalise(self._rows.batch(rows, 0, "none").to(self._device))
