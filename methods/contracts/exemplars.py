"""The fields of a method that trains on images of earlier tasks again.

Such a method has three hyper-parameters: `exemplars` (how many images), `exemplar_budget` (of what)
and `exemplar_selection` (which ones). They are facts for planning and for readers; which rows they
are is worked out in `operators/data/exemplars.py`, and the learner sees images and columns alone.
"""

from typing import Literal

Budget = Literal["total", "per_class"]
"""All classes share the number, fewer each as classes come; or each class keeps as many."""

Selection = Literal["herding", "barycenter", "random"]
"""Nearest to the mean of the frozen features, as iCaRL's paper has it or as its variant in
PromptFusion's library, or drawn from the run's seed."""


def rules(method: object) -> dict[str, tuple[bool, str]]:
    """Rules of the fields for `methods.contracts.hyperparameters.require`."""
    return {"exemplars": (method.exemplars >= 0, "at least 0")}  # type: ignore[attr-defined]
