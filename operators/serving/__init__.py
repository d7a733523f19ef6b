"""Models that predict outside a pipeline.

MLflow loads a recorded model through this module, by the name `loader_module` in its `MLmodel`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftwork.operators.serving.predictor import Predictor


def _load_pyfunc(path: str) -> "Predictor":
    """Loads a recorded model from a folder; the function that MLflow looks for."""
    # Here and not above: planning imports names from this package, and must not import torch.
    from graftwork.operators.serving import predictor

    return predictor.load_pyfunc(path)
