"""Card of a method: the facts by which operators and readers tell methods apart.

Shapes: N rows, D feature width, M projection width, C classes seen so far, K all classes.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

State = dict[str, Tensor]
"""Named tensors: statistics, or what a fitted method predicts with. Saved as safetensors."""


Growth = Literal["constant", "classes", "tasks", "rows"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Facts to know before comparing a method with another; data, not prose.

    Args:
        title: name as the paper writes it.
        paper: link to the paper.
        summary: one sentence.
        version: raised when results change; part of every key.
        exemplars: stored images of earlier tasks, by the method's defaults.
        uses_seed: draws random numbers; otherwise all seeds share one run.
        separable: a class's scores depend on that class's statistics alone, so that one fit
            on all classes serves every class order; by the method's defaults, see
            `methods.contracts.fitted.separable`.
        upper_bound: sees all seen tasks' rows at once; not a continual learner.
        memory: what is kept between tasks and how it grows, for example `C * D floats`.
        growth: what makes the kept grow, beside the rows of a classifier (at most 2 (D + 1) numbers
            per class) and counters of fewer than D numbers: `constant` (nothing does: from the
            second task on, a stream of more tasks needs no more), `classes` (something more for
            every class, such as covariances), `tasks` (something for every task, even if it brings
            no new class) or `rows` (every training image or its feature). Of several the last one.
        query: reads the frozen backbone's feature of an image, beside the image.
        independent: tasks train side by side, each on its own, and are joined afterwards
            (`Independent`, a special case of `trained`).
        shared: of an independent method, names of stored tensors that the first task trains and
            every later one starts from; the later ones then wait for the first.
        apart: every task trains weights of its own, which later ones leave as they are, whatever
            classes recur: a merge over tasks has nothing to merge.
        linear_layers: the linear maps that predict are weights as they stand, of whose inputs
            RegMean can take Gram matrices.
        images: reads images; otherwise their frozen features (`query`) are all that it is given.
        network: `vit` for a timm ViT, `clip` for a CLIP with both towers; what is fitted on
            features of a `vit` takes those of a CLIP's image tower as well.
        reference: reads images and texts that belong to no task, from the spec's `reference`.
        zero_shot: scores every class that has a name, whether it was trained or not.
        contract: `fitted` (`Fitted`: a sum over features, then a solve), `trained` (`Trained`:
            learns on images, task after task), `adapted` (`Adapted`: trains on the first task,
            then is fitted on the features of the adapted backbone) or `fused` (`Fused`: two trained
            branches on two networks, and a blend of their scores).

    Example:
        >>> card = graftwork.Card(
        ...     title="NCM",
        ...     paper="https://arxiv.org/abs/2210.04428",
        ...     summary="The nearest class mean.",
        ...     memory="C * D floats",
        ... )
        >>> card.contract, card.growth
        ('fitted', 'constant')
    """

    title: str
    paper: str
    summary: str
    memory: str
    version: int = 1
    exemplars: int = 0
    task_id_at_test: bool = False
    batch_information_at_test: bool = False
    uses_seed: bool = False
    separable: bool = False
    upper_bound: bool = False
    growth: Growth = "constant"
    query: bool = False
    independent: bool = False
    shared: tuple[str, ...] = ()
    apart: bool = False
    linear_layers: bool = True
    images: bool = True
    network: Literal["vit", "clip"] = "vit"
    reference: bool = False
    zero_shot: bool = False
    contract: Literal["fitted", "trained", "adapted", "fused"] = "fitted"
