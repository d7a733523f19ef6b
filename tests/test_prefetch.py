"""Work ahead of its consumer: order, what is in memory, errors, and no thread that stays."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftwork.methods.baselines.finetune import Finetune
from graftwork.operators.images.prefetch import batched, prefetch
from graftwork.operators.images.preprocessing import PRESETS
from graftwork.operators.stages import features
from graftwork.operators.training import forward, loop
from graftwork.operators.training.settings import Log, Settings
from tests import pngs, tiny

ROOT = Path(__file__).parent.parent
THREADS = 4


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Holds every test of this file to it, those with errors as well."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Traced:
    """A function of numbers, and the items that it is given, with what was seen of both.

    Args:
        slow: items that take a while.
        wrong: items that it refuses.
    """

    def __init__(self, slow: Sequence[int] = (), wrong: Sequence[int] = ()) -> None:
        self._slow, self._wrong, self._lock = slow, wrong, threading.Lock()
        self.taken = self.handed_out = self.most = 0
        self.began: list[int] = []
        self.takers: set[int] = set()

    def items(self, count: int) -> Iterator[int]:
        for item in range(count):
            self.taken += 1
            self.most = max(self.most, self.taken - self.handed_out)
            self.takers.add(threading.get_ident())
            yield item

    def __call__(self, item: int) -> int:
        with self._lock:
            self.began.append(item)
        time.sleep(0.05 if item in self._slow else 0)
        if item in self._wrong:
            raise ArithmeticError(item)
        return 10 * item

    def read(self, results: Iterator[int]) -> Iterator[int]:
        for result in results:
            yield result
            self.handed_out += 1


@pytest.mark.parametrize(("workers", "depth"), [(1, None), (1, 1), (3, None), (3, 2), (2, 50)])
def test_results_come_in_order_and_no_more_items_are_taken_than_depth_and_the_one_in_use(
    workers: int, depth: int | None
) -> None:
    work = Traced(slow=[0, 1, 9, 17])
    found = prefetch(work, work.items(40), workers=workers, depth=depth)
    assert list(work.read(found)) == list(range(0, 400, 10))
    assert sorted(work.began) == list(range(40))
    assert work.most == min((depth or 2 * workers) + 1, 40)
    assert work.takers == {threading.get_ident()}


def test_as_many_items_are_worked_on_as_there_are_threads() -> None:
    together = threading.Barrier(THREADS)

    def work(item: int) -> int:
        together.wait(20)
        return item

    assert list(prefetch(work, range(3 * THREADS), workers=THREADS)) == list(range(3 * THREADS))


def test_nothing_begins_before_a_result_is_asked_for() -> None:
    work = Traced()
    found = prefetch(work, work.items(9), workers=2)
    assert work.taken == 0
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]


def test_an_error_is_raised_in_its_place_and_the_rest_is_cancelled() -> None:
    work = Traced(slow=[0], wrong=[5, 6])
    found = prefetch(work, work.items(1000), workers=2, depth=8)
    assert [next(found) for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(ArithmeticError) as caught:
        next(found)
    assert caught.value.args == (5,)
    assert work.taken == 5 + 8
    assert list(found) == []


def test_an_error_of_the_items_comes_after_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    found = prefetch(Traced(slow=[0, 1, 2]), items(), workers=2, depth=8)
    assert [next(found) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_who_stops_early_cancels_what_has_not_begun() -> None:
    work = Traced(slow=range(1000))
    for result in prefetch(work, work.items(1000), workers=2, depth=100):
        assert result == 0
        break
    assert work.taken == 101
    assert len(work.began) < 10


def test_a_depth_or_a_number_of_threads_below_one_is_refused() -> None:
    for workers, depth in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            next(prefetch(abs, [1], workers=workers, depth=depth))


def test_batches_have_one_size_and_the_last_what_is_left() -> None:
    assert list(batched(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batched(range(6), 3)) == [[0, 1, 2], [3, 4, 5]]
    assert list(batched([], 3)) == []


class Together(tiny.TensorImages):
    """Images that are there once as many batches as threads are being prepared."""

    def __init__(self, count: int) -> None:
        super().__init__(torch.randn(count, 3, tiny.SIZE, tiny.SIZE), torch.arange(count) % 3)
        self._together = threading.Barrier(THREADS)

    def batch(self, rows: Sequence[int], epoch: int, augmentation: str) -> Tensor:
        self._together.wait(20)
        return super().batch(rows, epoch, augmentation)


@pytest.mark.parametrize("what", ["train", "map", "each"])
def test_every_decoder_has_work_in_training_and_in_plain_passes(what: str) -> None:
    method, task, images = Finetune(epochs=1, batch_size=1), tiny.task(0), Together(3 * THREADS)
    settings = Settings(seed=0, decoders=THREADS)
    if what == "train":
        _, log = loop.train_task(method, tiny.vit(1), task, images, None, settings)
        assert log.steps == len(images.targets)
        return
    learner, _ = loop.open_learner(method, tiny.vit(1), task, None, settings)
    log = Log()
    if what == "map":
        batches = [[row] for row in range(3 * THREADS)]
        forward.forward_plain(learner.logits, learner, images, settings, log, batches)
    else:
        plain = forward.PlainImages(learner, images, settings, log, method.recipe(task))
        plain.each(lambda pixels, targets, query: None, batch_size=1)
    assert log.images_forwarded == len(images.targets)


def test_an_extraction_that_fails_leaves_no_thread() -> None:
    def embed(pixels: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    def images() -> Iterator[bytes]:
        while True:
            yield pngs.png(0)

    with pytest.raises(RuntimeError, match="out of memory"):
        features.extract(images(), embed, PRESETS["micro_32"], batch_size=2, workers=THREADS)


def test_threads_that_work_ahead_are_made_in_one_place() -> None:
    made = [
        path.name
        for folder in ("methods", "operators", "pipelines", "cluster")
        for path in (ROOT / folder).rglob("*.py")
        if "ThreadPoolExecutor" in path.read_text()
    ]
    assert made == ["prefetch.py"]
