"""Every method has a card and strict hyper-parameters; the fitted ones keep the laws of sums."""

import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar, Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from graftwork import methods
from graftwork.methods import HyperparameterError
from graftwork.methods.contracts import hyperparameters
from graftwork.methods.contracts.batches import Neighbours
from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Fitted, Rows, separable, uses_seed
from graftwork.operators import catalogue

WIDTH, CLASSES = 8, 5

# Every method with its defaults at a tiny size, and the variants that take another path.
VARIANTS = [
    ("simplecil", {}),
    ("slda", {}),
    ("slda", {"prior": True, "shrinkage": 0.1}),
    ("fecam", {}),
    ("fecam", {"alpha1": 10, "alpha2": 10}),
    ("fecam", {"covariance": "common"}),
    ("acil", {}),
    ("acil", {"buffer": 16}),
    ("ranpac", {"projection_dim": 16}),
    ("ranpac", {"projection_dim": 16, "lambda_mode": "cumulative"}),
    ("ranpac", {"projection_dim": 16, "lambda_mode": "fixed", "score": "cosine"}),
    ("ranpac", {"projection_dim": 200}),
    ("ranpac", {"projection_dim": 0}),
    ("joint_linear", {}),
    ("joint_linear", {"solver": "logistic"}),
    ("zs_clip", {}),
]
each_variant = pytest.mark.parametrize(("name", "values"), VARIANTS)


def make_rows(number: int = 60, seed: int = 0, classes: int = CLASSES) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % classes
    means = 3 * torch.randn(classes, WIDTH, generator=generator)
    noise = torch.randn(number, WIDTH, generator=generator)
    samples = torch.randint(-(2**62), 2**62, (number,), generator=generator)
    return Rows(
        features=means[labels] + noise,
        labels=labels,
        samples=samples,
        num_classes=classes,
        texts=torch.stack([means, 2 * means]),
    )


def take(rows: Rows, index: torch.Tensor) -> Rows:
    return dataclasses.replace(
        rows,
        features=rows.features[index],
        labels=rows.labels[index],
        samples=rows.samples[index],
    )


def fit(method: Fitted, tasks: list[Rows], classes: list[int], seed: int = 0) -> State:
    parts = [method.statistics(task, seed) for task in tasks]
    total = parts[0]
    for part in parts[1:]:
        total = method.add(total, part)
    return method.solve(total, parts[-1], classes, seed)


def logits(method: Fitted, tasks: list[Rows], classes: list[int], seed: int = 0) -> torch.Tensor:
    return method.logits(fit(method, tasks, classes, seed), make_rows(40, seed=9).features, seed)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


each_name = pytest.mark.parametrize("name", [*methods.METHODS, *methods.PARTS])

# What a class of each contract must have.
SURFACES = {
    "fitted": {"statistics", "add", "solve", "logits", "report"},
    "trained": {"recipe", "learner"},
    "adapted": {"parts"},
    "fused": {"branches", "fit", "blend"},
}


def test_variants_cover_every_method_that_is_fitted():
    fitted = {name for name in methods.METHODS if hasattr(methods.load(name), "solve")}
    assert {name for name, _ in VARIANTS} == fitted
    names = ["simplecil", "slda", "fecam", "acil", "ranpac", "joint_linear"]
    assert list(methods.METHODS)[:6] == names


def test_import_needs_no_torch():
    code = "import sys; from graftwork import methods; "
    code += "assert 'torch' not in sys.modules; print(len(methods.METHODS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(len(methods.METHODS)), "")


@each_name
def test_card_and_docs_are_complete(name: str):
    cls = methods.load(name)
    assert isinstance(cls.card, Card)
    assert all(callable(getattr(cls, part, None)) for part in SURFACES[cls.card.contract])
    assert cls.card.uses_seed or cls.card.contract == "fitted"
    assert cls.card.paper.startswith("https://")
    assert cls.card.summary.endswith(".")
    assert cls.__doc__ is not None
    assert cls.card.paper in cls.__doc__
    for field in methods.fields(name):
        assert field.doc.endswith("."), field
        assert field.default is not None or field.type.endswith(" | null"), field


@each_variant
def test_split_order_and_shards_do_not_matter(name: str, values: dict):
    method, rows = methods.build(name, values), make_rows()
    last = torch.arange(40, 60)

    @settings(max_examples=5, deadline=None, database=None)
    @given(order=st.permutations(range(40)), cuts=st.lists(st.integers(1, 39), max_size=3))
    def check(order: list[int], cuts: list[int]):
        index, edges = torch.tensor(order), [0, *sorted(set(cuts)), 40]
        shards = [take(rows, index[a:b]) for a, b in itertools.pairwise(edges)] + [take(rows, last)]
        # The newest task alone may choose a strength: it stays whole here.
        assert_close(logits(method, shards, list(range(CLASSES))), expected)

    expected = logits(method, [take(rows, torch.arange(40)), take(rows, last)], [*range(CLASSES)])
    check()


@each_variant
def test_add_is_commutative_and_associative(name: str, values: dict):
    method, rows = methods.build(name, values), make_rows()
    a, b, c = (method.statistics(take(rows, torch.arange(i, 60, 3)), 0) for i in range(3))
    states = [
        method.solve(total, c, [*range(CLASSES)], 0)
        for total in (
            method.add(method.add(a, b), c),
            method.add(a, method.add(b, c)),
            method.add(c, method.add(b, a)),
        )
    ]
    features = make_rows(40, seed=9).features
    first, *others = (method.logits(state, features, 0) for state in states)
    for other in others:
        assert_close(other, first)


@each_variant
def test_same_calls_give_the_same_bits(name: str, values: dict):
    method, rows = methods.build(name, values), make_rows()
    tasks = [take(rows, torch.arange(30)), take(rows, torch.arange(30, 60))]
    first, second = (fit(method, tasks, [*range(CLASSES)]) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_variant
def test_logits_cover_exactly_the_seen_classes(name: str, values: dict):
    method, rows = methods.build(name, values), make_rows()
    seen = take(rows, torch.isin(rows.labels, torch.tensor([1, 3, 4])))
    scores = logits(method, [seen], [3, 1, 4])
    assert scores.shape == (40, 3)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    # Columns follow the order of the classes.
    assert_close(logits(method, [seen], [4, 3, 1]), scores[:, [2, 0, 1]])
    with pytest.raises(ValueError, match=r"classes: must have at least one row .* \[0\]"):
        logits(method, [seen], [3, 0, 1])


@each_variant
def test_class_repeated_over_tasks_adds_up(name: str, values: dict):
    method, rows = methods.build(name, values), make_rows()
    halves = [take(rows, torch.arange(0, 60, 2)), take(rows, torch.arange(1, 60, 2))]
    classes = [*range(CLASSES)]
    assert logits(method, halves, classes).shape == (40, CLASSES)
    accuracy = (
        method.logits(fit(method, halves, classes), rows.features, 0).argmax(1) == rows.labels
    )
    assert accuracy.float().mean() > 0.9


@each_variant
def test_classes_of_earlier_tasks_are_kept(name: str, values: dict):
    method, rows = methods.build(name, values), make_rows()
    tasks = [take(rows, torch.isin(rows.labels, torch.tensor(c))) for c in ([0, 1, 2], [3, 4])]
    scores = method.logits(fit(method, tasks, [*range(CLASSES)]), rows.features, 0)
    assert (scores.argmax(1) == rows.labels).float().mean() > 0.9


@each_variant
def test_sums_are_float64(name: str, values: dict):
    statistics = methods.build(name, values).statistics(make_rows(), 0)
    # `features` are rows that a method keeps as they came.
    sums = {key: tensor.dtype for key, tensor in statistics.items() if key != "features"}
    assert set(sums.values()) <= {torch.float64, torch.int64}, sums


@each_variant
def test_prediction_of_a_row_is_independent_of_its_batch(name: str, values: dict):
    method = methods.build(name, values)
    state = fit(method, [make_rows()], [*range(CLASSES)])
    features = make_rows(150, seed=9).features
    whole = method.logits(state, features, 0)
    alone = torch.cat([method.logits(state, row[None], 0) for row in features])
    parts = torch.cat([method.logits(state, part, 0) for part in features.split(37)])
    for other in (alone, parts):
        torch.testing.assert_close(other, whole, rtol=1e-6, atol=1e-6)
        assert torch.equal(other.argmax(1), whole.argmax(1))
    assert method.logits(state, features[:0], 0).shape == (0, CLASSES)


@each_variant
def test_save_and_load_give_the_same_logits(name: str, values: dict, tmp_path: Path):
    method, rows = methods.build(name, values), make_rows()
    statistics = method.statistics(rows, 0)
    save_file(statistics, tmp_path / "statistics.safetensors")
    loaded = load_file(tmp_path / "statistics.safetensors")
    state = method.solve(statistics, statistics, [*range(CLASSES)], 0)
    again = method.solve(loaded, loaded, [*range(CLASSES)], 0)
    save_file(state, tmp_path / "state.safetensors")
    stored = load_file(tmp_path / "state.safetensors")
    for other in (again, stored):
        assert torch.equal(
            method.logits(other, rows.features, 0), method.logits(state, rows.features, 0)
        )
    json.dumps(method.report(stored), allow_nan=False)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_features_of_any_dtype(name: str, values: dict, dtype: torch.dtype):
    method, rows = methods.build(name, values), make_rows()
    rows = dataclasses.replace(rows, features=rows.features.half())
    other = dataclasses.replace(rows, features=rows.features.to(dtype))
    classes = [*range(CLASSES)]
    state, expected = fit(method, [other], classes), fit(method, [rows], classes)
    assert_close(method.logits(state, other.features, 0), method.logits(expected, rows.features, 0))


@each_variant
@pytest.mark.parametrize("per_class", [1, 2])
def test_one_or_two_rows_per_class(name: str, values: dict, per_class: int):
    method, rows = methods.build(name, values), make_rows(per_class * CLASSES)
    scores = method.logits(fit(method, [rows], [*range(CLASSES)]), rows.features, 0)
    assert scores.isfinite().all()
    if name != "joint_linear":
        assert (scores.argmax(1) == rows.labels).float().mean() >= 0.8


@each_variant
def test_float32_serving_agrees_with_float64(
    name: str, values: dict, monkeypatch: pytest.MonkeyPatch
):
    method, rows = methods.build(name, values), make_rows(200)
    features = make_rows(500, seed=9).features
    served = method.logits(fit(method, [rows], [*range(CLASSES)]), features, 0)
    assert served.dtype == torch.float32
    # Weights and arithmetic without rounding to float32 anywhere but in FeCAM's factors.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    state = fit(method, [rows], [*range(CLASSES)])
    state = {key: value.double() if value.ndim else value for key, value in state.items()}
    if "projection" in state:
        state["projection"] = state["projection"].byte()
    exact = method.logits(state, features, 0)
    assert exact.dtype == torch.float64
    assert torch.equal(served.argmax(1), exact.argmax(1))
    assert_close(served.double(), exact)


@each_variant
def test_seed_is_used_only_where_declared(name: str, values: dict):
    method, rows = methods.build(name, values), make_rows()
    same = torch.equal(
        logits(method, [rows], [*range(CLASSES)], seed=0),
        logits(method, [rows], [*range(CLASSES)], seed=1),
    )
    if not uses_seed(method):
        assert same
    elif values.get("projection_dim") or values.get("buffer"):
        assert not same


@each_variant
def test_separable_methods_serve_any_subset_from_one_fit(name: str, values: dict):
    method, rows = methods.build(name, values), make_rows()
    subset = [4, 2]
    part = take(rows, torch.isin(rows.labels, torch.tensor(subset)))
    whole, alone = fit(method, [rows], [*range(CLASSES)]), fit(method, [part], subset)
    if separable(method):
        sliced = {key: value[subset] for key, value in whole.items() if len(value) == CLASSES}
        assert sliced.keys() == alone.keys()
        assert all(torch.equal(sliced[key], alone[key]) for key in alone)
    else:
        scores = method.logits(whole, rows.features, 0)[:, subset]
        # Also up to a number common to a row's scores.
        apart = scores - method.logits(alone, rows.features, 0)
        assert not torch.allclose(apart[:, 0], apart[:, 1], atol=1e-3)
    facts, _ = catalogue.method(name, values)
    classifier = facts.get("parts", {}).get("classifier", facts["card"])
    assert classifier["separable"] is separable(method)


DEFAULTS = [(name, {}) for name in (*methods.METHODS, *methods.PARTS)]


@pytest.mark.parametrize(
    ("name", "values"), DEFAULTS + [variant for variant in VARIANTS if variant[1]]
)
def test_hyperparameters_survive_json(name: str, values: dict):
    method = methods.build(name, values)
    assert dataclasses.is_dataclass(method)
    assert not isinstance(method, type)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.card = None  # pyright: ignore[reportAttributeAccessIssue]
    text = json.dumps(dataclasses.asdict(method), allow_nan=False)
    assert methods.build(name, json.loads(text)) == method
    assert pickle.loads(pickle.dumps(method)) == method


@each_name
def test_unknown_fields_and_positional_values_are_refused(name: str):
    with pytest.raises(HyperparameterError, match=f"stranger: must be a field of {name}.*, got 1"):
        methods.build(name, {"stranger": 1})
    with pytest.raises(TypeError, match="positional"):
        methods.load(name)(1)


@each_name
def test_wrong_types_are_refused_by_every_field(name: str):
    for field in methods.fields(name):
        # True is an integer to Python, but no value of any field but a bool.
        wrong = "true" if field.type == "bool" else True
        with pytest.raises(HyperparameterError) as caught:
            methods.build(name, {field.name: wrong})
        assert [found for found, _ in caught.value.problems] == [field.name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voter:
    """A stand-in for a method that may choose by the whole batch.

    Args:
        eval_selection: who chooses.
    """

    card: ClassVar[Card] = Card(title="", paper="", summary="", memory="", contract="trained")

    eval_selection: Literal["instance", "batch_vote"] = "instance"

    def neighbours(self) -> Neighbours | None:
        return None if self.eval_selection == "instance" else Neighbours(size=3)


@pytest.mark.parametrize(("selection", "batch"), [("instance", False), ("batch_vote", True)])
def test_card_says_that_a_batch_votes(selection: str, batch: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(methods.METHODS, "voter", "stand_in:Voter")
    monkeypatch.setitem(sys.modules, "stand_in", cast(ModuleType, SimpleNamespace(Voter=Voter)))
    facts, problems = catalogue.method("voter", {"eval_selection": selection})
    assert problems == []
    assert facts["card"]["batch_information_at_test"] is batch
    assert facts["neighbours"] == ({"size": 3, "walk": "tasks"} if batch else None)
    assert Voter.card.batch_information_at_test is False


@pytest.mark.parametrize(
    ("name", "values", "draws"),
    [
        ("acil", {}, False),
        ("acil", {"buffer": 64}, True),
        ("ranpac", {}, True),
        ("ranpac", {"projection_dim": 0}, True),
        ("ranpac", {"projection_dim": 0, "lambda_mode": "fixed"}, False),
        ("ranpac", {"projection_dim": 0, "lambda_mode": "fixed", "first_session": "ssf"}, True),
        ("finetune", {}, True),
        ("simplecil", {}, False),
    ],
)
def test_only_what_draws_has_a_run_for_each_seed(name: str, values: dict, draws: bool):
    facts, problems = catalogue.method(name, values)
    assert problems == []
    assert facts["card"]["uses_seed"] is draws
    if "parts" in facts:
        assert facts["parts"]["classifier"]["uses_seed"] is draws


def test_only_adapted_and_fused_methods_have_parts():
    for name in methods.METHODS:
        facts, _ = catalogue.method(name, {})
        assert ("parts" in facts) == (facts["card"]["contract"] in ("adapted", "fused")), name
        assert facts["hyperparameters"] == hyperparameters.resolved(methods.build(name, {}))


def test_integers_become_floats():
    assert methods.build("acil", {"gamma": 1}) == methods.build("acil", {"gamma": 1.0})
    assert type(methods.build("acil", {"gamma": 1}).gamma) is float  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("acil", {"gama": 1.0}, "gama: must be a field of acil (did you mean gamma?), got 1.0"),
        ("simplecil", {"lr": 0.1}, "lr: must be a field of simplecil, got 0.1"),
        ("acil", {"gamma": True}, "gamma: must be a number, got True"),
        ("acil", {"gamma": "0.1"}, "gamma: must be a number, got '0.1'"),
        ("acil", {"gamma": None}, "gamma: must be a number, got None"),
        ("acil", {"gamma": float("nan")}, "gamma: must be a finite number, got nan"),
        ("acil", {"gamma": float("inf")}, "gamma: must be a finite number, got inf"),
        ("acil", {"gamma": 0}, "gamma: must be greater than 0, got 0.0"),
        ("acil", {"buffer": True}, "buffer: must be an integer, got True"),
        ("acil", {"buffer": 16.0}, "buffer: must be an integer, got 16.0"),
        ("acil", {"buffer": -1}, "buffer: must be between 0 and 100000, got -1"),
        ("slda", {"prior": 1}, "prior: must be true or false, got 1"),
        ("slda", {"shrinkage": 1.5}, "shrinkage: must be between 0 and 1, got 1.5"),
        ("fecam", {"alpha2": 2}, "alpha2: must be between 0 and alpha1, got 2.0"),
        ("ranpac", {"score": "dot"}, "score: must be one of linear, cosine, got 'dot'"),
        ("ranpac", {"projection_dim": 10**9}, "projection_dim: must be between 0 and 100000"),
        ("joint_linear", {"max_iterations": 0}, "max_iterations: must be between 1 and 100000"),
    ],
)
def test_wrong_hyperparameters_are_refused(name: str, values: dict, message: str):
    with pytest.raises(HyperparameterError) as caught:
        methods.build(name, values)
    assert str(caught.value).startswith(message)


def test_all_problems_are_reported_at_once():
    values = {"projection": 5, "ridge": -1, "score": 3, "projection_dim": "2000"}
    with pytest.raises(HyperparameterError) as caught:
        methods.build("ranpac", values)
    assert {field for field, _ in caught.value.problems} == set(values)
    assert len(str(caught.value).splitlines()) == 4
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.problems == caught.value.problems
    assert isinstance(again, ValueError)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean ranpac\?\), got 'ranpack'"):
        methods.load("ranpack")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Fields of several methods.

    Args:
        kept: as the base has it.
        told: of the base.
    """

    kept: int = 1
    told: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Including(Common):
    """A stand-in for a method that includes fields.

    Args:
        told: of the method,
            at length.
        own: nobody else's.
    """

    kept: int = 3
    own: int = 4


def test_a_field_is_explained_by_the_nearest_class_that_does():
    assert [(f.name, f.default, f.doc) for f in hyperparameters.describe(Including)] == [
        ("kept", 3, "as the base has it."),
        ("told", 2, "of the method, at length."),
        ("own", 4, "nobody else's."),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grown:
    """A stand-in for a method that got a field after results of it were stored."""

    old: int = 1
    limit: int | None = dataclasses.field(default=None, metadata=hyperparameters.LATER)
    kind: Literal["a", "b"] = dataclasses.field(default="a", metadata=hyperparameters.LATER)


def test_a_later_field_is_in_no_key_while_it_means_what_was_done_before():
    def resolved(**values: object) -> dict:
        return hyperparameters.resolved(hyperparameters.build(Grown, "grown", values))

    assert resolved() == resolved(limit=None, kind="a") == {"old": 1}
    assert resolved(limit=0, kind="b") == {"old": 1, "limit": 0, "kind": "b"}
    assert [field.type for field in hyperparameters.describe(Grown)][1:] == ["int | null", "a | b"]
    with pytest.raises(HyperparameterError, match=r"limit: must be an integer, got 1\.5"):
        resolved(limit=1.5)
    with pytest.raises(HyperparameterError, match="old: must be an integer, got None"):
        resolved(old=None)


# Hyper-parameters that keys hold of methods which have later fields: those of the first version.
FIRST = {
    "coda_prompt": (
        *("epochs", "batch_size", "lr", "optimizer", "schedule", "pool_size", "prompt_length"),
        *("layers", "mu", "gs", "augmentation"),
    ),
    "fecam": ("alpha1", "alpha2", "tukey"),
}


@pytest.mark.parametrize("name", FIRST)
def test_results_that_were_stored_before_a_later_field_are_found(name: str):
    facts, _ = catalogue.method(name, {})
    assert facts["hyperparameters"].keys() == set(FIRST[name])


def test_fields_describe_themselves():
    fields = {field.name: field for field in methods.fields("ranpac")}
    assert list(fields)[:4] == ["projection_dim", "lambda_mode", "ridge", "score"]
    assert fields["projection_dim"].type == "int"
    assert fields["projection_dim"].default == 10_000
    assert fields["lambda_mode"].type == "last_task | cumulative | fixed"
    assert fields["projection_dim"].doc.startswith("M, width of the random projection;")
    assert methods.fields("simplecil") == []
