"""Train ``vit_micro_patch4_32`` on one CPU core: labels plus distillation from ViT-Ti.

The student starts as the first five blocks of the teacher (patch embedding and positions resized
to 4-pixel patches) and learns CIFAR-100 labels and the teacher's features at the same time. With
``--evaluate`` the script only measures the weights in ``--out`` as frozen features; the digits are
seen there alone, never in training.
"""

import argparse
import io
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import Tensor, nn

from graftwork.operators.backbones.shipped import VIT_MICRO
from graftwork.operators.data import digits

TEACHER = "vit_tiny_patch16_224"
BATCH = 128
PEAK_LR = 5e-4
WARMUP = 0.04
KD_WEIGHT = 3.0


def create(name: str, **kwargs: Any) -> VisionTransformer:
    """Build a timm ViT without a classifier."""
    model = timm.create_model(name, num_classes=0, **kwargs)
    assert isinstance(model, VisionTransformer)
    return model


def decode(pngs: Sequence[bytes], size: int) -> Tensor:
    """Return images as uint8 (N, 3, size, size)."""
    arrays = []
    for png in pngs:
        image = Image.open(io.BytesIO(png)).convert("RGB")
        arrays.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images of a Parquet file as uint8 (N, 3, 32, 32), and their labels."""
    table = pq.read_table(path, columns=["image", "label"])
    labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    return decode(table["image"].to_pylist(), 32), labels


def normalise(images: Tensor) -> Tensor:
    """Map [0, 1] to [-1, 1]: mean = std = 0.5 for student and teacher alike."""
    return images * 2 - 1


@torch.no_grad()
def features(model: nn.Module, images: Tensor, size: int, batch: int, bf16: bool) -> Tensor:
    """Return the float32 features of uint8 images, resized to ``size``."""
    model.eval()
    out = []
    for chunk in images.split(batch):
        x = chunk.float() / 255
        if size != x.shape[-1]:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out.append(model(normalise(x)).float())
    return torch.cat(out)


def initialise(student: VisionTransformer, teacher: VisionTransformer) -> None:
    """Copy the teacher's first blocks; resize its patch embedding and positions."""
    state = teacher.state_dict()
    for key in student.state_dict():
        if key.startswith("patch_embed.proj.weight"):
            # Upsampling a 4-pixel patch and applying the teacher's 16-pixel filter is linear, so
            # the product of the two maps is a 4-pixel filter: no approximation inside the patch.
            new, old = student.patch_embed.patch_size[0], teacher.patch_embed.patch_size[0]
            basis = torch.eye(new * new).reshape(new * new, 1, new, new)
            upsample = F.interpolate(basis, size=old, mode="bicubic")[:, 0]
            weight = torch.einsum("ocyx,pyx->ocp", state[key], upsample)
            state[key] = weight.reshape(*weight.shape[:2], new, new)
        elif key == "pos_embed":
            cls_pos, grid = state[key][:, :1], state[key][:, 1:]
            side = math.isqrt(grid.shape[1])
            grid = grid.transpose(1, 2).reshape(1, -1, side, side)
            grid = F.interpolate(
                grid, size=student.patch_embed.grid_size, mode="bicubic", antialias=True
            )
            state[key] = torch.cat([cls_pos, grid.flatten(2).transpose(1, 2)], dim=1)
    student.load_state_dict({key: state[key] for key in student.state_dict()})


def augment(x: Tensor) -> Tensor:
    """Vary geometry, colour and sharpness of a batch of [0, 1] images.

    Besides the usual crops and flips, images lose colour, detail, or all but their edges at times:
    the features shall serve grey and low-resolution drawings too, not only photographs.
    """
    n, _, side, _ = x.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, 1, 1, 1).uniform_(low, high)

    def chosen(p: float) -> Tensor:
        return torch.rand(n, 1, 1, 1) < p

    angle = uniform(-0.25, 0.25).flatten()
    scale = uniform(0.7, 1.1).flatten()
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = scale * flip * angle.cos()
    theta[:, 0, 1] = -scale * angle.sin()
    theta[:, 1, 0] = scale * flip * angle.sin()
    theta[:, 1, 1] = scale * angle.cos()
    theta[:, :, 2] = torch.empty(n, 2).uniform_(-0.25, 0.25)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = ((x - mean) * uniform(0.6, 1.4) + mean + uniform(-0.2, 0.2)).clamp(0, 1)
    grey = x.mean(dim=1, keepdim=True)
    x = torch.where(chosen(0.3), grey.expand_as(x), x)

    dy = F.pad(grey[:, :, 1:] - grey[:, :, :-1], (0, 0, 0, 1))
    dx = F.pad(grey[:, :, :, 1:] - grey[:, :, :, :-1], (0, 1))
    edges = (dx.square() + dy.square()).sqrt()
    edges = edges / edges.amax(dim=(2, 3), keepdim=True).clamp_min(1e-3)
    x = torch.where(chosen(0.1), edges.expand_as(x), x)

    factor = 2 if torch.rand(()) < 0.7 else 4
    coarse = F.interpolate(F.avg_pool2d(x, factor), size=side, mode="bicubic").clamp(0, 1)
    x = torch.where(chosen(0.2), coarse, x)
    return torch.where(chosen(0.1), 1 - x, x)


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as float16, in one step as seen by readers."""
    temporary = path.with_suffix(".tmp")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, temporary)
    temporary.chmod(0o644)  # safetensors creates files that only their owner can read
    os.replace(temporary, path)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` runs from 0 to 1."""
    if progress < WARMUP:
        return PEAK_LR * (progress + 1e-3) / WARMUP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(args: argparse.Namespace) -> None:
    """Train for ``args.minutes`` and write the weights to ``args.out``."""
    torch.manual_seed(args.seed)
    images, labels = read_images(args.train)
    test_images, test_labels = read_images(args.test)

    teacher = create(TEACHER)
    teacher_state = load_file(args.teacher)
    teacher.load_state_dict(
        {k: v for k, v in teacher_state.items() if not k.startswith("head.")}, strict=True
    )
    student = create(VIT_MICRO, drop_path_rate=0.05)
    initialise(student, teacher)

    start = time.monotonic()
    targets = features(teacher, images, 224, 32, args.bf16)
    # Standardised, or a few features of large variance would be all that is distilled.
    targets = (targets - targets.mean(dim=0)) / targets.std(dim=0)
    print(f"teacher features: {time.monotonic() - start:.0f} s", flush=True)

    head = nn.Linear(student.num_features, int(labels.max()) + 1)
    projection = nn.Linear(student.num_features, targets.shape[1])
    modules = nn.ModuleList([student, head, projection])
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )

    def report(epoch: int, limit: int) -> None:
        predicted = head(features(student, test_images[:limit], 32, 256, False)).argmax(dim=1)
        accuracy = (predicted == test_labels[:limit]).float().mean()
        seconds = time.monotonic() - start
        print(
            f"epoch {epoch}, {seconds:.0f} s: linear head {accuracy:.4f} on {limit} test images",
            flush=True,
        )

    start = time.monotonic()
    budget = 60 * args.minutes
    epoch, progress = 0, 0.0
    # The schedule follows the clock: the run ends on time on a slow or shared machine too.
    while progress < 1:
        modules.train()
        losses = []
        batches = torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]
        for indices in batches:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress)
            x = normalise(augment(images[indices].float() / 255))
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                z = student(x)
            z = z.float()
            classify = F.cross_entropy(head(z), labels[indices], label_smoothing=0.1)
            distil = 1 - F.cosine_similarity(projection(z), targets[indices]).mean()
            optimizer.zero_grad(set_to_none=True)
            (classify + KD_WEIGHT * distil).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(distil.item())
            progress = (time.monotonic() - start) / budget
            if progress >= 1:
                break
        epoch += 1
        print(f"epoch {epoch}: distillation loss {np.mean(losses):.4f}", flush=True)
        if epoch % 3 == 1:
            report(epoch, 1000)
            save(student, args.out)
    save(student, args.out)
    report(epoch, len(test_images))


def nearest_mean(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Return the accuracy of the nearest class mean by cosine similarity."""
    means = torch.stack([train_x[train_y == c].mean(dim=0) for c in train_y.unique()])
    predicted = (F.normalize(test_x, dim=1) @ F.normalize(means, dim=1).T).argmax(dim=1)
    return (train_y.unique()[predicted] == test_y).float().mean().item()


def ridge(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Return the accuracy of ridge regression on one-hot labels.

    The penalty, relative to the mean feature power, is chosen on a fifth of the training samples.
    """

    def fit(x: Tensor, y: Tensor, penalty: float) -> Tensor:
        gram = x.T @ x
        gram.diagonal().add_(penalty * gram.diagonal().mean())
        return torch.linalg.solve(gram, x.T @ F.one_hot(y, int(train_y.max()) + 1).double())

    def accuracy(weight: Tensor, x: Tensor, y: Tensor) -> float:
        return ((x @ weight).argmax(dim=1) == y).float().mean().item()

    def with_bias(x: Tensor) -> Tensor:
        return F.pad(x.double(), (0, 1), value=1.0)

    x, held_out = with_bias(train_x), torch.arange(len(train_x)) % 5 == 0
    penalties = [10.0**e for e in range(-6, 2)]
    scores = [
        accuracy(fit(x[~held_out], train_y[~held_out], p), x[held_out], train_y[held_out])
        for p in penalties
    ]
    best = penalties[scores.index(max(scores))]
    return accuracy(fit(x, train_y, best), with_bias(test_x), test_y)


def evaluate(args: argparse.Namespace) -> None:
    """Print the accuracies of the model card that need frozen features only."""
    model = create(VIT_MICRO)
    model.load_state_dict(load_file(args.out), strict=True)
    train_x, train_y = read_images(args.train)
    test_x, test_y = read_images(args.test)
    data = [features(model, x, 32, 256, False) for x in (train_x, test_x)]
    print(f"CIFAR-100, nearest class mean: {nearest_mean(data[0], train_y, data[1], test_y):.4f}")
    print(f"CIFAR-100, ridge: {ridge(data[0], train_y, data[1], test_y):.4f}")

    pngs = digits.images("train") + digits.images("test")
    labels = torch.from_numpy(np.concatenate([digits.labels("train"), digits.labels("test")]))
    test = torch.arange(len(pngs)) >= len(digits.labels("train"))
    images = decode(pngs, 32)
    frozen = features(model, images, 32, 256, False)
    generator = torch.Generator().manual_seed(args.seed)
    projection = torch.randn(frozen.shape[1], 2000, generator=generator)
    for name, x in {
        "8x8 pixels": decode(pngs, 8)[:, 0].flatten(1) / 255,
        "32x32 pixels": images[:, 0].flatten(1) / 255,
        "features": frozen,
        "projected features": (frozen @ projection).relu(),
    }.items():
        split = x[~test], labels[~test], x[test], labels[test]
        print(f"digits, {name}: nearest class mean {nearest_mean(*split):.4f}", end=", ")
        print(f"ridge {ridge(*split):.4f}")


def main() -> None:
    """Read the command line; train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="Parquet: image (PNG), label")
    parser.add_argument("--test", type=Path, required=True, help="Parquet, as --train")
    parser.add_argument("--teacher", type=Path, help="ViT-Ti/16 safetensors; for training")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file of the student")
    parser.add_argument("--minutes", type=float, default=34.0, help="length of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 arithmetic (AVX512-BF16)")
    parser.add_argument("--evaluate", action="store_true", help="measure --out, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(args)
    elif args.teacher is None:
        parser.error("training needs --teacher")
    else:
        train(args)


if __name__ == "__main__":
    main()
