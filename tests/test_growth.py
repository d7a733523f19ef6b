"""How memory grows with the number of tasks: measured, and compared with what cards say.

Counted are the numbers that pass from task to task, after streams of one, two and four tasks of
three classes each, of two tasks with the same classes, and of one task with twice the images.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from graftwork import methods
from graftwork.methods.contracts.card import Growth, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.contracts.trained import Task
from tests import test_conformance as conformance
from tests import test_methods, tiny

PROMISED = (
    *("finetune", "joint", "vpt_shallow", "vpt_deep", "l2p", "dualprompt", "coda_prompt", "dap"),
    *("simplecil", "aper_finetune", "aper_vpt_shallow", "aper_vpt_deep", "aper_ssf"),
    *("aper_adapter", "ranpac", "slca", "esn", "promptfusion", "proof", "lae", "zscl", "cofima"),
    *("fecam", "slda", "acil", "ease"),
)
"""Methods that published work on this subject compares."""

WIDTH, CLASSES = 8, 3
SMALL = {"ranpac": {"projection_dim": 16}}
"""Changes with which a few rows are more than the dimensions, as in real streams."""

Stream = tuple[int, bool, int]
"""Tasks, whether each brings classes of its own, images per class and task."""

TRAINED = {case.name: case for case in reversed(conformance.CASES)}


def growth(count: Callable[[Stream], int], width: int, rows: bool) -> Growth:
    """The class of growth that the numbers kept after some streams show.

    Args:
        width: D; a classifier's row has at most twice as many numbers, and two more.
        rows: whether the number of images can matter at all.
    """
    one = count((1, True, 8))
    if rows and count((1, True, 16)) - one >= width:
        return "rows"
    again = count((2, False, 8))
    if again - one >= width:
        # What is kept from the second task on, once and for all, is no growth.
        more = count((4, False, 8)) - again
        assert more < width or more / 2 == pytest.approx(again - one, rel=0.2, abs=width)
        if more >= width:
            return "tasks"
    two, four = count((2, True, 8)), count((4, True, 8))
    step = (four - two) / (2 * CLASSES)
    assert step == pytest.approx((two - again) / CLASSES, rel=0.2, abs=width)
    return "classes" if step > 2 * (width + 1) else "constant"


def numbers(*states: State) -> int:
    return sum(tensor.numel() for state in states for tensor in state.values())


def after_training(*names: str) -> Callable[[Stream], int]:
    """Numbers stored after the last task of a stream; of several branches together.

    Of an independent method they are what was joined: experts are gone once they are taken in.
    """
    cases = [TRAINED[name].but(epochs=1, batch_size=64) for name in names]

    def count(stream: Stream) -> int:
        total, new, _ = stream
        return numbers(*(conformance.train(case, tasks_of(total, new))[-1] for case in cases))

    return count


def tasks_of(total: int, new: bool) -> list[Task]:
    if new:
        return [tiny.task(index, CLASSES, total) for index in range(total)]
    first = tiny.task(0, CLASSES, total)
    return [
        dataclasses.replace(first, index=index, before=CLASSES if index else 0)
        for index in range(total)
    ]


def after_fitting(name: str) -> Callable[[Stream], int]:
    """Numbers of the statistics, and of what is served, after the last task of a stream."""
    method = methods.build(name, SMALL.get(name, {}))
    texts = torch.randn(1, 4 * CLASSES, WIDTH) if method.card.network == "clip" else None

    def count(stream: Stream) -> int:
        total, new, per_class = stream
        given = [rows_of(task, new, per_class) for task in range(total)]
        parts = [method.statistics(dataclasses.replace(rows, texts=texts), 0) for rows in given]
        summed = parts[0]
        for part in parts[1:]:
            summed = method.add(summed, part)
        seen = list(range(CLASSES * total if new else CLASSES))
        return numbers(summed, method.solve(summed, parts[-1], seen, 0))

    return count


def rows_of(task: int, new: bool, per_class: int) -> Rows:
    """Rows of a task, every class around a point of its own."""
    labels = torch.arange(CLASSES * per_class) % CLASSES + (CLASSES * task if new else 0)
    generator = torch.Generator().manual_seed(task)
    noise = torch.randn(len(labels), WIDTH, generator=generator)
    return Rows(
        features=noise + 3 * torch.nn.functional.one_hot(labels % WIDTH, WIDTH),
        labels=labels,
        samples=torch.randint(-(2**62), 2**62, (len(labels),), generator=generator),
        num_classes=4 * CLASSES,
    )


def classifier_of(name: str) -> str:
    """What is fitted after every task; a first session trains once, on the first."""
    method = methods.load(name)()
    parts = method.parts() if method.card.contract == "adapted" else None
    return parts.classifier[0] if parts and parts.classifier else name


def branches_of(name: str) -> list[str]:
    """What is trained on every task: the method itself, or the parts of a fused one."""
    method = methods.load(name)()
    if method.card.contract != "fused":
        return [name]
    branches = method.branches()
    return [branches.clip[0], branches.vit[0]]


@pytest.mark.parametrize("name", methods.METHODS)
def test_memory_grows_as_the_card_says(name: str) -> None:
    card = methods.load(name).card
    if card.contract in ("fitted", "adapted"):
        found = growth(after_fitting(classifier_of(name)), WIDTH, rows=True)
    elif card.upper_bound:
        found = "rows"  # it passes nothing on: it needs every image of all tasks again
    else:
        width = conformance.network(TRAINED[branches_of(name)[-1]]).num_features
        found = growth(after_training(*branches_of(name)), int(width), rows=False)
    assert (name, card.growth) == (name, found)
    assert card.memory


def test_promised_methods_are_there() -> None:
    assert set(PROMISED) <= set(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_held_to_the_laws_of_its_contract(name: str) -> None:
    fitted = {variant for variant, _ in test_methods.VARIANTS}
    contract = methods.load(name).card.contract
    if contract in ("trained", "fused"):
        assert set(branches_of(name)) <= set(TRAINED)
        return
    assert classifier_of(name) in fitted
    if contract == "adapted" and (session := methods.load(name)().parts().first_session):
        assert f"first_session-{session.peft}" in {case.label for case in conformance.CASES}
