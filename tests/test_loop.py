"""The training loop, and what it is made of: orders of rows, schedules, snapshots, seeds."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.baselines.finetune import Finetune, FinetuneLearner
from graftwork.methods.contracts.card import Card
from graftwork.methods.contracts.trained import Recipe, restore
from graftwork.methods.parts import optim
from graftwork.methods.parts.heads import current_cross_entropy
from graftwork.operators.errors import Diverged
from graftwork.operators.seeds import derive
from graftwork.operators.training import forward, loop
from graftwork.operators.training.batches import row_batches
from graftwork.operators.training.settings import Log, Settings, Snapshot
from tests import tiny

METHOD = Finetune(epochs=2, batch_size=5, lr=0.01)


def recipe(**changes: Any) -> Recipe:
    return Recipe(
        **{
            "epochs": 1,
            "batch_size": 5,
            "augmentation": "none",
            "optimizer": optim.optimizer("sgd", 0.1),
            "schedule": optim.schedule("constant"),
            **changes,
        }
    )


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_every_row_is_in_one_batch_of_an_epoch() -> None:
    batches = row_batches(12, recipe(), 0, 0, 0)
    assert list(map(len, batches)) == [5, 5, 2]
    assert sorted(flat(batches)) == list(range(12))
    assert flat(batches) != list(range(12))


def test_the_order_depends_on_seed_task_and_epoch_and_on_nothing_else() -> None:
    torch.manual_seed(5)
    first = row_batches(12, recipe(), 0, 0, 0)
    torch.manual_seed(6)
    assert row_batches(12, recipe(), 0, 0, 0) == first
    # The size of the batches cuts one and the same order.
    assert flat(row_batches(12, recipe(batch_size=4), 0, 0, 0)) == flat(first)
    others = [row_batches(12, recipe(), *parts) for parts in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(other != first for other in others)


def test_a_short_last_batch_is_left_out_unless_it_is_the_only_one() -> None:
    drop = recipe(drop_last=True)
    assert list(map(len, row_batches(12, drop, 0, 0, 0))) == [5, 5]
    assert list(map(len, row_batches(10, drop, 0, 0, 0))) == [5, 5]
    assert list(map(len, row_batches(3, drop, 0, 0, 0))) == [3]


def test_without_shuffling_rows_come_as_they_are() -> None:
    assert row_batches(6, recipe(shuffle=False), 0, 0, 3) == [[0, 1, 2, 3, 4], [5]]


def test_derived_seeds_are_fixed_numbers() -> None:
    assert derive(0) == 7520536977032167579
    assert derive(0, "task", 1) == 8885329967707916746
    many = {derive(s, what, t) for s in range(9) for what in ("a", "b") for t in range(9)}
    assert len(many) == 162
    assert all(0 <= seed < 2**63 for seed in many)
    assert derive(1, 11) != derive(11, 1)


@pytest.mark.parametrize("epochs", [1, 2, 20])
def test_cosine_is_torchs(epochs: int) -> None:
    factor = optim.schedule("cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(epochs):
        rate = optimizer.param_groups[0]["lr"]
        assert 2.0 * factor(epoch, epochs) == pytest.approx(rate, abs=1e-12)
        optimizer.step()
        reference.step()


def test_half_cosine_constant_and_milestone() -> None:
    half = optim.schedule("half_cosine")
    assert (half(0, 20), half(0, 1)) == (1.0, 1.0)
    assert half(19, 20) == pytest.approx(math.cos(99 * math.pi / 200))
    assert half(10, 21) == pytest.approx(math.cos(99 * math.pi / 400))
    assert [optim.schedule("constant")(epoch, 3) for epoch in range(3)] == [1.0, 1.0, 1.0]
    assert [optim.milestone(2)(epoch, 4) for epoch in range(4)] == [1.0, 1.0, 0.1, 0.1]


def test_optimizers_and_what_a_group_says_itself() -> None:
    tensors = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    for name, kind in (
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("amsgrad", torch.optim.Adam),
    ):
        groups = [{"params": tensors[:1]}, {"params": tensors[1:], "lr": 0.5, "weight_decay": 0.0}]
        made = optim.optimizer(name, 0.1, 0.01)(groups)  # type: ignore[arg-type]
        assert type(made) is kind
        assert [g["lr"] for g in made.param_groups] == [0.1, 0.5]
        assert [g["weight_decay"] for g in made.param_groups] == [0.01, 0.0]
    assert made.param_groups[0]["betas"] == (0.9, 0.9)
    assert made.param_groups[0]["amsgrad"]


def test_the_schedule_reaches_the_optimizer() -> None:
    rates: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    class Method(Finetune):
        def recipe(self, task: Any) -> Recipe:
            return recipe(
                epochs=3,
                batch_size=6,
                optimizer=lambda groups: Recording(groups, lr=0.02),
                schedule=optim.milestone(2),
            )

    task = tiny.task(0)
    loop.train_task(Method(), tiny.vit(1), task, tiny.images(task), None, Settings(seed=0))
    assert rates == pytest.approx([0.02] * 4 + [0.002] * 2)


def test_current_cross_entropy_is_the_one_with_other_columns_at_minus_infinity() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 6, generator=generator, requires_grad=True)
    task = tiny.task(1)
    targets = torch.tensor([3, 4, 5, 3, 4, 5, 3, 4])
    found = current_cross_entropy(scores, targets, task)
    masked = scores.detach().clone()
    masked[:, :3] = -torch.inf
    assert torch.allclose(found, F.cross_entropy(masked, targets))
    found.backward()
    assert scores.grad is not None
    assert (scores.grad[:, :3] == 0).all()
    half = current_cross_entropy(scores.bfloat16(), targets, task)
    assert half.dtype == torch.float32


def test_the_log_has_means_over_images_not_over_steps() -> None:
    task, said = tiny.task(0), []
    _, log = loop.train_task(
        METHOD,
        tiny.vit(1),
        task,
        tiny.images(task),
        None,
        Settings(seed=0),
        say=lambda **facts: said.append(facts),
    )
    losses = [facts["loss"] for facts in said]
    assert [(f["epoch"], f["step"], f["steps"]) for f in said] == [
        (epoch, step, 3) for epoch in (1, 2) for step in (1, 2, 3)
    ]
    for epoch, (a, b, c) in enumerate((losses[:3], losses[3:])):
        assert log.epochs[epoch]["loss"] == pytest.approx((5 * a + 5 * b + 2 * c) / 12)
    assert (log.steps, log.images_forwarded) == (6, 24)
    assert log.trainable == sum(p.numel() for p in tiny.vit(1).parameters()) + 3 * 48 + 3


def test_every_snapshot_continues_to_the_same_end() -> None:
    task, settings = tiny.task(0), Settings(seed=0, every=0)
    kept: list[Snapshot] = []

    def run(**more: Any) -> tuple[dict[str, Tensor], Log]:
        return loop.train_task(METHOD, tiny.vit(1), task, tiny.images(task), None, settings, **more)

    state, log = run(keep=kept.append)
    assert [(s.epoch, s.step) for s in kept] == [(e, s) for e in (0, 1) for s in (1, 2, 3)]
    for snapshot in kept:
        again, resumed = run(resume=snapshot)
        assert all(torch.equal(again[name], state[name]) for name in state)
        assert resumed.epochs == log.epochs
        assert (resumed.steps, resumed.images_forwarded) == (log.steps, log.images_forwarded)


def test_divergence_names_the_step_and_its_images() -> None:
    task = tiny.task(0)
    images = tiny.images(task)
    order = row_batches(12, METHOD.recipe(task), 0, 0, 0)
    images.pixels[order[1][3]] = torch.inf
    names = ", ".join(f"image {row}" for row in order[1][:4])
    message = rf"task 0, epoch 1, step 2: loss nan, gradient norm nan; .*{names} and 1 more$"
    with pytest.raises(Diverged, match=message):
        loop.train_task(METHOD, tiny.vit(1), task, images, None, Settings(seed=0))


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    task, start = tiny.task(0), tiny.opened(METHOD, tiny.task(0), None, 1)

    class Method(Finetune):
        def recipe(self, task: Any) -> Recipe:
            return recipe(batch_size=12, clip=0.01, optimizer=lambda g: torch.optim.SGD(g, lr=1.0))

    state, _ = loop.train_task(
        Method(), tiny.vit(1), task, tiny.images(task), None, Settings(seed=0)
    )
    own = start.state_dict()
    moved = torch.stack([(state[name] - own[name]).norm() for name in state]).norm()
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_plain_images_are_padded_and_in_order() -> None:
    task = tiny.task(0)
    images = tiny.images(task, per_class=7)  # 21 images in batches of 8
    learner, log = tiny.opened(METHOD, task, None, 1), Log()
    settings = Settings(seed=0)
    sizes: list[int] = []

    def first(pixels: Tensor, query: Tensor | None) -> Tensor:
        sizes.append(len(pixels))
        assert query is None
        return pixels[:, 0, 0, :2]

    found = forward.PlainImages(learner, images, settings, log, recipe()).map(first)
    assert torch.equal(found, images.pixels[:, 0, 0, :2])
    assert sizes == [forward.PLAIN_BATCH["cpu"]] * 3
    assert log.images_forwarded == 21


def test_each_gives_every_image_once_with_gradients_in_an_order_of_its_own() -> None:
    task = tiny.task(0)
    images = tiny.images(task, per_class=7)
    learner, log = tiny.opened(METHOD, task, None, 1), Log()
    settings, how = Settings(seed=0), recipe(epochs=3, augmentation="flip", drop_last=True)
    data = forward.PlainImages(learner, images, settings, log, how)

    def pixels(batch_size: int, augmented: bool) -> tuple[list[int], Tensor, Tensor]:
        sizes, first, targets = [], [], []

        def visit(batch: Tensor, columns: Tensor, query: Tensor | None) -> None:
            assert torch.is_grad_enabled() and query is None
            sizes.append(len(batch))
            first.append(batch)
            targets.append(columns)

        data.each(visit, batch_size=batch_size, augmented=augmented)
        return sizes, torch.cat(first), torch.cat(targets)

    # The order and the augmentation of the epoch after the last.
    rows = flat(row_batches(21, recipe(), 0, 0, 3))
    sizes, plain, targets = pixels(5, False)
    assert sizes == [5, 5, 5, 5, 1]
    assert torch.equal(plain, images.pixels[rows]) and torch.equal(targets, images.targets[rows])
    sizes, augmented, _ = pixels(8, True)
    assert sizes == [8, 8, 5]
    assert torch.equal(augmented, images.batch(rows, 3, "flip"))
    assert log.images_forwarded == 42


def test_epochs_begin_with_their_number_also_after_an_interruption() -> None:
    task = tiny.task(0)
    begun: list[int] = []

    class Noting(FinetuneLearner):
        def begin_epoch(self, epoch: int) -> None:
            begun.append(epoch)

    @dataclass(frozen=True)
    class Method:
        card: ClassVar[Card] = METHOD.card

        def recipe(self, task: Any) -> Recipe:
            return recipe(epochs=2, batch_size=6)

        def learner(self, vit: Any, task: Any) -> Noting:
            return Noting(vit, task, METHOD)

    kept: list[Snapshot] = []
    settings, images = Settings(seed=0, every=0), tiny.images(task)
    loop.train_task(Method(), tiny.vit(1), task, images, None, settings, keep=kept.append)
    assert begun == [0, 1]
    begun.clear()
    loop.train_task(Method(), tiny.vit(1), task, images, None, settings, resume=kept[2])
    assert (kept[2].epoch, kept[2].step, begun) == (1, 1, [1])


def test_restore_copies_leading_rows_and_refuses_what_does_not_fit() -> None:
    learner = tiny.opened(METHOD, tiny.task(1), None, 1)
    fresh = learner.get_parameter("head.weight").detach().clone()
    restore(learner, {"head.weight": torch.ones(3, tiny.WIDTH)})
    weight = learner.get_parameter("head.weight")
    assert (weight[:3] == 1).all()
    assert torch.equal(weight[3:], fresh[3:])
    with pytest.raises(ValueError, match=r"head\.wait \[3\] has no place"):
        restore(learner, {"head.wait": torch.ones(3)})
    with pytest.raises(ValueError, match=r"head\.weight \[7, 48\] does not fit \[6, 48\]"):
        restore(learner, {"head.weight": torch.ones(7, tiny.WIDTH)})
    with pytest.raises(ValueError, match=r"head\.weight \[3, 4\] does not fit"):
        restore(learner, {"head.weight": torch.ones(3, 4)})
