"""The MLflow model of a finished run."""

from typing import Any

from graftwork.operators.files import access
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.serving import model_files
from graftwork.operators.store import Store
from graftwork.operators.tracking.records import Artifacts
from graftwork.pipelines.planning.plan import Plan, Run
from graftwork.pipelines.planning.shared import Shared


def model_identity(plan: Plan, run: Run) -> str | None:
    """Digest of what a run predicts with; None if no model is kept of it."""
    kept = plan.spec.tracking.models
    if run.served is None or kept == "none" or (kept == "fitted" and trains(run)):
        return None
    return model_files.identity(*_description(plan, run))


def trains(run: Run) -> bool:
    """Tells whether a network was trained for a run, or for what it combines."""
    return run.method.trains or any(trains(parent) for parent in run.parents)


def model(plan: Plan, store: Store, run: Run) -> Artifacts:
    """The files of the run's MLflow model; none if the store has dropped a state meanwhile."""
    description, states = _description(plan, run)
    if not all(store.has(operator, key) for operator, key, _ in states.values()):
        return {}
    return model_files.model_files(store, description, states)


def _description(plan: Plan, run: Run) -> tuple[dict[str, Any], dict[str, model_files.Stored]]:
    """`model.json` of a run, and where the states are that it names."""
    assert run.served is not None
    beside = run.served.beside
    description = {
        "predictor": to_json(run.served.predictor),
        "columns": list(range(len(run.stream.classes))),
        "classes": list(run.stream.classes),
        **_network(plan),
        "dtype": plan.spec.features.dtype,
        **({model_files.BESIDE: _network(beside)} if beside else {}),
    }
    states = {
        name: (stage.operator, stage.key, prefix)
        for name, (stage, prefix) in run.served.states.items()
    }
    return description, states


def _network(of: Plan | Shared) -> dict[str, Any]:
    """A network, and how images are prepared for it."""
    backbone = of.backbone
    fixed = backbone.data_config.get("fixed_input_size", False)
    return {
        "backbone": {
            "model": backbone.model,
            "weights": _place_of(backbone.weights, of.spec.backbone.weights == "builtin"),
            "pooling": backbone.pooling,
            "fingerprint": backbone.fingerprint,
            "image_size": backbone.image_size,
        },
        "preprocessing": of.preprocessing.to_json(),
        "size": backbone.data_config["input_size"][1] if fixed else None,
        "precision": of.spec.backbone.precision,
    }


def _place_of(weights: str, shipped: bool) -> str:
    """The backbone's weights, as any process on this machine can name them."""
    if shipped:
        return "builtin"
    return weights if weights in ("", "random") else access.absolute(weights)
