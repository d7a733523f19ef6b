"""Classifiers of tasks side by side: which row is whose, and what is refused."""

from collections.abc import Mapping

import torch
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Task, restore
from graftwork.methods.parts.stage_heads import StageHeads

WIDTH = 2


def task(index: int, current: tuple[int, ...], before: int, seen: int) -> Task:
    return Task(index=index, count=3, current=current, before=before, seen=seen)


class Holder(torch.nn.Module):
    """Something that `restore` fills."""

    def __init__(self, heads: StageHeads) -> None:
        super().__init__()
        self.heads = heads

    def adopt(self, stored: State) -> Mapping[str, Tensor]:
        return self.heads.adopt(stored, "heads")


def after(tasks: list[Task]) -> StageHeads:
    """The heads after tasks whose classifier n is n + 1 for the weights, 10 times it for biases."""
    stored: State = {}
    heads = StageHeads(WIDTH, tasks[0])
    for number, one in enumerate(tasks, 1):
        heads = StageHeads(WIDTH, one)
        if stored:
            restore(Holder(heads), stored)  # type: ignore[arg-type]
        rows = torch.arange(1.0, 1 + len(one.current))[:, None]
        heads.take(rows.expand(-1, WIDTH) * number, rows[:, 0] * 10 * number)
        stored = {f"heads.{name}": t.clone() for name, t in heads.state_dict().items()}
    again = StageHeads(WIDTH, tasks[-1])
    restore(Holder(again), stored)  # type: ignore[arg-type]
    return again


NO = float("-inf")


def test_new_classes_have_one_row_each_whatever_the_sizes() -> None:
    heads = after([task(0, (0, 1, 2), 0, 3), task(1, (3,), 3, 4), task(2, (4, 5), 4, 6)])
    assert heads.stage.tolist() == [0, 0, 0, 1, 2, 2]
    assert heads.weight.shape == (6, WIDTH)
    ones = torch.ones(1, WIDTH)
    assert heads([ones, 2 * ones, 0 * ones])[0].tolist() == [
        [12.0, 24.0, 36.0, NO, NO, NO],
        [NO, NO, NO, 28.0, NO, NO],
        [NO, NO, NO, NO, 30.0, 60.0],
    ]


def test_classes_that_recur_have_a_row_in_every_task_that_had_them() -> None:
    heads = after([task(0, (0, 2), 0, 3), task(1, (0, 1, 2), 3, 3), task(2, (1,), 3, 3)])
    assert heads.stage.tolist() == [0, 0, 1, 1, 1, 2]
    assert heads.column.tolist() == [0, 2, 0, 1, 2, 1]
    found = heads([torch.zeros(1, WIDTH)] * 3)[0]
    assert found.tolist() == [[10.0, NO, 20.0], [20.0, 40.0, 60.0], [NO, 30.0, NO]]


def test_a_task_may_have_old_and_new_classes() -> None:
    heads = after([task(0, (0, 1), 0, 2), task(1, (1, 2), 2, 3), task(2, (0, 3), 3, 4)])
    found = heads([torch.zeros(1, WIDTH)] * 3)[0]
    assert found.tolist() == [
        [10.0, 20.0, NO, NO],
        [NO, 20.0, 40.0, NO],
        [30.0, NO, NO, 60.0],
    ]


def test_what_was_stored_without_columns_is_read_as_it_was_meant() -> None:
    new = [task(0, (0, 1, 2), 0, 3), task(1, (3,), 3, 4)]
    again = [task(0, (0, 2), 0, 3), task(1, (0, 1, 2), 3, 3)]
    for tasks, stage in ((new, [0, 0, 0, 1]), (again, [0, -1, 0, 1, 1, 1])):
        rows = torch.arange(1.0, 1 + len(stage))
        stored = {
            "heads.weight": torch.zeros(len(stage), WIDTH),
            "heads.bias": rows,
            "heads.stage": torch.tensor(stage),
        }
        heads = StageHeads(WIDTH, tasks[-1])
        restore(Holder(heads), stored)  # type: ignore[arg-type]
        found = heads([torch.zeros(1, WIDTH)] * 2)[0]
        seen = tasks[-1].seen
        wanted = torch.full((2, seen), NO)
        for place, number in enumerate(stage):
            if number >= 0:
                wanted[number, place % seen] = rows[place]
        assert torch.equal(found, wanted)


def test_scores_are_float32_under_autocast() -> None:
    heads = after([task(0, (0, 1), 0, 2)])
    heads.weight.fill_(1.001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads([torch.ones(1, WIDTH)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 0], torch.tensor([12.002, 22.002]))
