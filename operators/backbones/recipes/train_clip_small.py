"""Train ``clip_small_96`` on one CPU core: a small CLIP for tests and examples.

The image tower is a frozen ViT-Ti at 96 pixels, of which only the projection into the joint space
is trained; the text tower is new. Images and the names of their classes, in one of several
templates, are drawn together. Of every second class only a few images are shown, so that methods
have something left to learn. With ``--evaluate`` the script only measures the file in ``--out``.
"""

import argparse
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from graftwork.methods.networks.clip import Clip, class_texts, phrases, unit
from graftwork.operators.backbones import clip as clip_models

MODEL = "open_clip:clip_small_96"
SIZE = 96
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a bad photo of a {}.",
    "a good photo of a {}.",
    "a blurry photo of a {}.",
    "a picture of a {}",
    "{}",
    "{}.",
)


def read_images(path: Path) -> tuple[list[bytes], Tensor]:
    """Encoded images of a Parquet file, and their labels."""
    table = pq.read_table(path, columns=["image", "label"])
    labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    return table["image"].to_pylist(), labels


def decode(encoded: Sequence[bytes]) -> Tensor:
    """Normalised images [B, 3, SIZE, SIZE]."""
    arrays = []
    for image in encoded:
        pixels = Image.open(io.BytesIO(image)).convert("RGB")
        arrays.append(np.asarray(pixels.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def create(start: Path) -> Clip:
    """The model, its image tower as in a timm file of ViT-Ti."""
    clip = clip_models.build(MODEL)
    trunk = clip.model.visual.trunk
    state = {k: v for k, v in load_file(start).items() if not k.startswith("head.")}
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], trunk.patch_embed.grid_size, num_prefix_tokens=1
    )
    trunk.load_state_dict(state)
    return clip


@torch.no_grad()
def trunk_features(clip: Clip, encoded: Sequence[bytes], flip: bool, bf16: bool) -> Tensor:
    """Output [N, V] of the trunk, before the projection."""
    parts = []
    for begin in range(0, len(encoded), 100):
        images = decode(encoded[begin : begin + 100])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            parts.append(clip.model.visual.trunk(images.flip(3) if flip else images).float())
    return torch.cat(parts)


def train(clip: Clip, features: Tensor, labels: Tensor, names: list[str], steps: int) -> None:
    """Train projection and text tower on pairs of a frozen feature and a class's text."""
    model = clip.model
    trained = [p for n, p in model.named_parameters() if not n.startswith("visual.trunk.")]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    tokens = [clip.tokenise(phrases(names, template)) for template in TEMPLATES]
    labels, order = labels.sort(stable=True)
    features, count = features[order], torch.bincount(labels, minlength=len(names))
    first = count.cumsum(0) - count
    started = time.perf_counter()
    for step in range(steps):
        # Every class as often, however few images it has.
        chosen = torch.randint(len(names), (512,))
        rows = first[chosen] + (torch.rand(512) * count[chosen]).long()
        texts = unit(clip.text(tokens[int(torch.randint(len(tokens), ()))]))
        images = unit(model.visual.head(features[rows]))
        scores = model.logit_scale.exp() * images @ texts.T
        loss = F.cross_entropy(scores, labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        if step % 50 == 49 or step == steps - 1:
            print(f"step {step + 1}/{steps} loss {loss:.3f} {time.perf_counter() - started:.0f} s")
    clip.requires_grad_(False)


@torch.no_grad()
def report(clip: Clip, features: Tensor, labels: Tensor, names: list[str]) -> None:
    """Zero-shot accuracy, of all classes and of both halves."""
    texts = class_texts(clip, names, TEMPLATES[:1])
    right = (unit(clip.model.visual.head(features)) @ texts.T).argmax(dim=1) == labels
    often = labels % 2 == 0
    for what, rows in (("all", right), ("often shown", right[often]), ("rare", right[~often])):
        print(f"zero-shot accuracy, {what} classes: {100 * rows.float().mean():.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name in ("train", "test", "classes", "start", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--few", type=int, default=5, help="images of every second class")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    names = json.loads(given.classes.read_text())
    clip = create(given.start)
    if not given.evaluate:
        encoded, labels = read_images(given.train)
        order = torch.arange(len(labels))
        place = torch.stack([(labels[: i + 1] == labels[i]).sum() - 1 for i in range(len(labels))])
        rows = order[(labels % 2 == 0) | (place < given.few)]
        encoded, labels = [encoded[int(row)] for row in rows], labels[rows]
        views = [trunk_features(clip, encoded, flip, given.bf16) for flip in (False, True)]
        print(f"{len(labels)} images")
        train(clip, torch.cat(views), labels.repeat(2), names, given.steps)
        state = {n: v.contiguous() for n, v in clip.model.state_dict().items()}
        save_file(state, given.out)
    clip.model.load_state_dict(load_file(given.out))
    encoded, labels = read_images(given.test)
    report(clip, trunk_features(clip, encoded, False, given.bf16), labels, names)


if __name__ == "__main__":
    main()
