"""PromptFusion: prompted CLIP for stability, a prompted ViT for plasticity, one learned weight.

Shapes: B batch, N rows, C classes seen, M context length, W width of CLIP's text tower, V width of
its image tower, D width of the ViT, L prompt lengths.
"""

from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fused import Branches
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.mixtures.promptfusion_clip import Stabiliser
from graftwork.methods.mixtures.promptfusion_parts import PAPER, Common, rules
from graftwork.methods.mixtures.promptfusion_vit import Booster


@dataclass(frozen=True, kw_only=True)
class PromptFusion(Common):
    """Blends the scores of a prompted CLIP and a prompted ViT by one learned weight.

    Chen et al., https://arxiv.org/abs/2303.07223; without its Lite variant, which spares the ViT
    for some images. The two branches train side by side as two chains, each with a loss of its own,
    and the weight is fitted after each task on the scores of both; the authors' code trains all of
    it at once by the loss of the blended scores. Defaults are those for CIFAR-100.

    Args:
        lr: learning rate of both branches.
        clip: largest norm of all gradients of a branch together; 0 does not clip.
        exemplar_selection: how the images are chosen, by features of CLIP.
        context_length: M, learned vectors before a class's name; 0 leaves the name alone.
        image_prompt_length: learned tokens beside an image's patches in CLIP.
        vit_prompt_length: learned tokens beside an image's patches in the ViT.
        legacy_double_x: keep M placeholders behind the context, as the authors' code does.
    """

    card: ClassVar[Card] = Card(
        title="PromptFusion",
        paper=PAPER,
        summary="Scores of a prompted CLIP and of a prompted ViT, blended by one learned weight.",
        memory="C * M * W + L * V + L * D + C * (D + 3) + 1 floats; images",
        exemplars=5000,
        uses_seed=True,
        growth="classes",
        network="clip",
        contract="fused",
    )

    context_length: int = 30
    image_prompt_length: int = 30
    vit_prompt_length: int = 30
    legacy_double_x: bool = False

    def __post_init__(self) -> None:
        require(self, rules(self))

    def branches(self) -> Branches:
        values = asdict(self)
        return Branches(
            clip=("promptfusion_clip", {f.name: values[f.name] for f in fields(Stabiliser)}),
            vit=("promptfusion_vit", {f.name: values[f.name] for f in fields(Booster)}),
        )

    def fit(self, clip: Tensor, vit: Tensor, targets: Tensor) -> State:
        """`weight`, before its sigmoid: where the cross-entropy of the blend is least."""
        return {"weight": fit_weight(clip, vit, targets)}

    def blend(self, state: State, clip: Tensor, vit: Tensor) -> Tensor:
        return blend(clip, vit, state["weight"])


def blend(clip: Tensor, vit: Tensor, weight: Tensor) -> Tensor:
    """Scores (1 - s) clip + s vit, s = sigmoid(weight); exactly one of the two at infinity."""
    share = weight.sigmoid()
    return (1 - share) * clip + share * vit


def fit_weight(clip: Tensor, vit: Tensor, targets: Tensor) -> Tensor:
    """The weight [1] of `blend` that makes the cross-entropy least.

    The cross-entropy is convex in s, so that there is one: its derivative is halved 60 times. At
    the ends, where one branch is better alone, s is 1e-6 or 1 - 1e-6.

    Args:
        clip: scores [N, C].
        vit: scores [N, C].
        targets: columns [N].
    """
    clip, vit = clip.double(), vit.double()
    apart = vit - clip
    right = apart.gather(1, targets[:, None]).mean()

    def slope(share: float) -> float:
        likely = (clip + share * apart).softmax(dim=1)
        return float((likely * apart).sum(dim=1).mean() - right)

    low, high = 1e-6, 1 - 1e-6
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return torch.logit(torch.tensor([0.5 * (low + high)], dtype=torch.float64)).float()
