"""PromptFusion: prompted CLIP for stability, a prompted ViT for plasticity, one learned weight.

Shapes: B batch, N rows, C classes seen, M context length, W width of CLIP's text tower, V width of
its image tower, D width of the ViT, L prompt lengths.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fused import Branches
from graftwork.methods.contracts.hyperparameters import LATER, require
from graftwork.methods.mixtures.promptfusion_clip import Stabiliser
from graftwork.methods.mixtures.promptfusion_joint import Joint
from graftwork.methods.mixtures.promptfusion_parts import PAPER, Common, blend, rules
from graftwork.methods.mixtures.promptfusion_vit import Booster


@dataclass(frozen=True, kw_only=True)
class PromptFusion(Common):
    """Blends the scores of a prompted CLIP and a prompted ViT by one learned weight.

    Chen et al., https://arxiv.org/abs/2303.07223; without its Lite variant, which spares the ViT
    for some images. Defaults are those for CIFAR-100, but for the training, which takes two chains
    side by side; the authors' is `joint`.

    Args:
        lr: learning rate of both branches.
        clip: largest norm of all gradients of a branch together; 0 does not clip.
        exemplar_selection: how the images are chosen, by features of CLIP.
        context_length: M, learned vectors before a class's name; 0 leaves the name alone.
        image_prompt_length: learned tokens beside an image's patches in CLIP.
        vit_prompt_length: learned tokens beside an image's patches in the ViT.
        legacy_double_x: keep M placeholders behind the context, as the authors' code does.
        training: trains the branches apart, each with a loss of its own, and fits the weight after
            each task on the scores of both; or, as published, all of it at once by one loss of the
            blended scores, on one image for both networks, prepared as for CLIP.
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
    training: Literal["apart", "joint"] = field(default="apart", metadata=LATER)

    def __post_init__(self) -> None:
        require(self, rules(self))

    def branches(self) -> Branches:
        values = asdict(self)
        return Branches(
            clip=("promptfusion_clip", {f.name: values[f.name] for f in fields(Stabiliser)}),
            vit=("promptfusion_vit", {f.name: values[f.name] for f in fields(Booster)}),
        )

    def joint(self) -> tuple[str, dict[str, Any]] | None:
        if self.training == "apart":
            return None
        values = asdict(self)
        return "promptfusion_joint", {f.name: values[f.name] for f in fields(Joint)}

    def fit(self, clip: Tensor, vit: Tensor, targets: Tensor) -> State:
        """`weight`, before its sigmoid: where the cross-entropy of the blend is least."""
        return {"weight": fit_weight(clip, vit, targets)}

    def blend(self, state: State, clip: Tensor, vit: Tensor) -> Tensor:
        return blend(clip, vit, state["weight"])


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
