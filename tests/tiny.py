"""Tiny real ViTs and tensor data for tests of trained methods; seconds for all of them."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Learner, Task, Trained, shared, trains
from graftwork.methods.networks.clip import VOCABULARY, Clip
from graftwork.methods.networks.network import Pair
from graftwork.operators.backbones import shipped
from graftwork.operators.training import loop
from graftwork.operators.training.settings import Settings

assert shipped  # registers vit_micro_patch4_32

SIZE, WIDTH, HEADS = 32, 48, 4
NAMES = (
    *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed"),
    *("bee", "beetle", "bicycle", "bottle", "bowl", "boy"),
)


def vit(depth: int = 6, seed: int = 0, **changes: Any) -> VisionTransformer:
    """A random timm ViT: images of 32 pixels, patches of 8, 16 + 1 tokens; in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model(
            "vit_tiny_patch16_224",
            **{
                "img_size": SIZE,
                "patch_size": 8,
                "embed_dim": WIDTH,
                "num_heads": HEADS,
                "depth": depth,
                "num_classes": 0,
                **changes,
            },
        )
    assert isinstance(network, VisionTransformer)
    return network.eval().requires_grad_(False)


def clip(seed: int = 0, tower: str = "own", **changes: Any) -> Clip:
    """A random CLIP: images of 32 pixels, joint space of 24; in eval mode.

    Args:
        tower: of the images, open_clip's "own" or "timm".
    """
    import open_clip

    vision: dict[str, Any] = {"image_size": SIZE}
    if tower == "own":
        vision |= {"layers": 2, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 8}
    else:
        name = "vit_micro_patch4_32"
        vision |= {"timm_model_name": name, "timm_pool": "token", "timm_proj": "linear"}
    text = {"vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Clip(open_clip.CLIP(24, vision, text))  # type: ignore[arg-type]
    return network.eval().requires_grad_(False)


def pair(seed: int = 0, tower: str = "own", depth: int = 2, **changes: Any) -> Pair:
    """A random CLIP and a random ViT for the same images."""
    return Pair(clip(seed, tower), vit(depth, seed, **changes))


class TensorImages:
    """Training images of a task held as a tensor [N, 3, h, w]; augmented by reproducible noise."""

    def __init__(
        self,
        pixels: Tensor,
        targets: Tensor,
        query: Tensor | None = None,
        exemplars: Tensor | None = None,
    ) -> None:
        self.pixels, self.targets, self.query = pixels, targets, query
        none = torch.zeros(len(targets), dtype=torch.bool)
        self.exemplars = none if exemplars is None else exemplars

    def batch(self, rows: Sequence[int], epoch: int, augmentation: str) -> Tensor:
        chosen = self.pixels[list(rows)]
        if augmentation == "none":
            return chosen
        noise = [
            torch.randn(
                self.pixels.shape[1:], generator=torch.Generator().manual_seed(1000 * epoch + row)
            )
            for row in rows
        ]
        return chosen + 0.1 * torch.stack(noise)

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels

    def name(self, row: int) -> str:
        return f"image {row}"


class Reference:
    """Random images and a few texts of no task."""

    texts: tuple[str, ...] = ("a river", "two people", "a street at night", "a red car", "snow")

    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(7)
        self.pixels = torch.randn(count, 3, SIZE, SIZE, generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, rows: Sequence[int]) -> Tensor:
        return self.pixels[list(rows)]


def task(index: int, classes: int = 3, count: int = 2) -> Task:
    """Task `index` of a class-incremental stream with `classes` classes in each task."""
    before = index * classes
    return Task(
        index=index,
        count=count,
        current=tuple(range(before, before + classes)),
        before=before,
        seen=before + classes,
        names=NAMES[: before + classes],
        templates=("a photo of a {}.",),
    )


def images(
    of: Task, per_class: int = 4, seed: int = 0, query: Tensor | None = None
) -> TensorImages:
    """Random images, every class around a pattern of its own."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.tensor(of.current).repeat_interleave(per_class)
    patterns = torch.randn(64, 3, SIZE, SIZE, generator=generator)
    noise = torch.randn(len(targets), 3, SIZE, SIZE, generator=generator)
    return TensorImages(patterns[targets] + 0.3 * noise, targets, query)


def train(
    method: Trained,
    tasks: int = 2,
    *,
    seed: int = 0,
    depth: int = 6,
    classes: int = 3,
    settings: Settings | None = None,
) -> list[State]:
    """What is stored after each task of a stream, by the real loop."""
    states: list[State] = []
    for index in range(tasks):
        this = task(index, classes, tasks)
        state, _ = loop.train_task(
            method,
            vit(depth),
            this,
            images(this),
            states[-1] if states else None,
            settings or Settings(seed=seed),
        )
        states.append(state)
    return states


def train_side_by_side(
    method: Trained, tasks: Sequence[Task], depth: int = 2, per_class: int = 4
) -> tuple[list[State], list[State]]:
    """What is stored of each task's expert, and after each task of an independent method."""
    experts: list[State] = []
    joins: list[State] = []
    settings = Settings(seed=0)
    for this in tasks:
        given = images(this, per_class)
        start = shared(method, joins[0]) if joins else None
        expert, _ = loop.train_task(trains(method), vit(depth), this, given, start, settings)
        before = joins[-1] if joins else None
        state, _ = loop.join_task(method, vit(depth), this, given, before, expert, settings)
        experts.append(expert)
        joins.append(state)
    return experts, joins


def opened(
    method: Trained, of: Task, state: State | None, depth: int = 6, seed: int = 0
) -> Learner:
    """A learner with a stored state, in eval mode, on a fresh tiny ViT."""
    learner, _ = loop.open_learner(method, vit(depth), of, state, Settings(seed=seed))
    return learner.eval()
