"""The contract of trained methods: a recipe, and a network that learns task after task.

A method is a frozen dataclass of hyper-parameters, as everywhere. For every task it makes a new
`Learner` on a fresh copy of the pre-trained network; `restore` fills in what earlier tasks left,
and what is stored afterwards is what the learner holds beyond the untouched backbone. Nothing else
passes from task to task, so that a run may stop after any task and continue in another process.

Tasks of an independent method (`Independent`) do not wait for each other: each trains an expert of
its own, and a learner that trains nothing takes one expert after the other in.

Shapes: B batch, N rows of a task, D width, C classes seen (columns of the logits).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import TypeVar

from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.card import Card, State
from graftwork.methods.networks.network import Network


@dataclass(frozen=True, kw_only=True)
class Task:
    """Facts that a method may know about a task: positions, never class ids.

    Args:
        index: t, from 0.
        count: T, number of tasks of the stream; None unless the method needs it, see
            `methods/contracts/stream.py`.
        current: columns of this task's classes, ascending; all of them have training images now.
        before: columns that existed before this task.
        seen: C, columns that exist after it.
        names: of the classes of all C columns; only for methods on CLIP.
        templates: texts with one `{}` for a name, likewise.
        mask: columns that a training step chooses from: those that the method takes, or of these
            the ones of the batch's own classes.

    Example:
        >>> task = graftwork.Task(index=1, current=(2, 3), before=2, seen=4)
    """

    index: int
    count: int | None = None
    current: tuple[int, ...]
    before: int
    seen: int
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    mask: Literal["method", "batch"] = "method"

    def counted(self) -> int:
        """T, for a method that needs it.

        Raises:
            ValueError: it is not known.
        """
        if self.count is None:
            raise ValueError("count: must be the number of tasks of the stream, got None")
        return self.count


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Recipe by which a task is trained.

    Args:
        epochs: passes over the task's images.
        batch_size: images per step, of all workers together.
        augmentation: of the training images; "none" is the test transform.
        optimizer: from parameter groups to a new optimiser.
        schedule: (epoch, epochs) -> factor on every group's learning rate, epochs from 0.
        step_schedule: (step, steps) -> a further factor, steps of the whole task from 0; None for
            none.
        clip: largest norm of all gradients together; 0 does not clip.
        drop_last: leave out a last batch that is smaller than the others.
        shuffle: draw a new order in every epoch; otherwise the data set's own.
        times: steps on each batch one after the other, each with an augmentation of its own.

    Example:
        >>> recipe = graftwork.Recipe(
        ...     epochs=5,
        ...     batch_size=16,
        ...     augmentation="flip",
        ...     optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        ...     schedule=lambda epoch, epochs: 1 - epoch / epochs,
        ... )
        >>> recipe.schedule(1, 5)
        0.8
    """

    epochs: int
    batch_size: int
    augmentation: Augmentation
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    schedule: Callable[[int, int], float]
    step_schedule: Callable[[int, int], float] | None = None
    clip: float = 0.0
    drop_last: bool = False
    shuffle: bool = True
    times: int = 1


class TaskImages(Protocol):
    """The training images of a task, exemplars of earlier ones among them."""

    targets: Tensor
    """Columns [N] int64."""
    exemplars: Tensor
    """Bool [N], which of them are exemplars."""

    def map(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        batches: list[list[int]] | None = None,
    ) -> Tensor:
        """Rows [N, ...] of `function(images [B, 3, h, w], query [B, D] or None)` on all images.

        On images without augmentation, without gradients and in the data set's order; always with
        the same batch size.

        Args:
            function: each row from its own image, unless there are `batches`.
            batches: rows of every batch, each row in one, for a function that mixes them.
        """
        ...

    def each(
        self,
        function: Callable[[Tensor, Tensor, Tensor | None], None],
        *,
        batch_size: int,
        augmented: bool = False,
    ) -> None:
        """Calls `function(images [B, 3, h, w], targets [B], query [B, D] or None)` on batches.

        With gradients, in the precision of the training, in an order drawn once for the task. Every
        worker gets all batches, so that what is summed over them needs no exchange.

        Args:
            function: called once per batch; the last batch may be smaller.
            batch_size: images per call.
            augmented: with the recipe's augmentation, as in one more epoch.
        """
        ...


class Reference(Protocol):
    """Images and texts that belong to no task, and stay the same for all of them."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        """R, the number of images."""
        ...

    def batch(self, rows: Sequence[int]) -> Tensor:
        """Normalised images [B, 3, h, w] of some rows in 0..R-1, as they are, on the device."""
        ...


NETWORK = "vit"
"""Name of the network in a learner's state, before that of a tensor in it.

It is no longer what the network is called, but results that were stored under it are found and read
as before: states, what is measured for merges, and snapshots all have the names of a learner's
tensors.
"""

N = TypeVar("N", bound=Network, default=VisionTransformer)
"""The network that a learner builds on: a ViT unless it says `Learner[Clip]`."""


class Learner(nn.Module, Generic[N]):
    """The network of one task: a ViT or a CLIP, and what the method adds to it.

    Parameters are on the device and trained as they stand with `requires_grad`; the network arrives
    frozen, and a method that trains it says so (`network.requires_grad_(True)`). Parameters and
    buffers that grow with the tasks grow along their first axis. New ones are initialised from
    torch's global generator, which was seeded for the run's seed and the task.

    Example:
        >>> class Probe(graftwork.Learner):
        ...     def __init__(self, network, task):
        ...         super().__init__(network, task)
        ...         self.head = torch.nn.Linear(network.num_features, task.seen)
        ...
        ...     def forward(self, images, targets, query):
        ...         scores = self.logits(images, query)
        ...         return {"loss": torch.nn.functional.cross_entropy(scores, targets)}
        ...
        ...     def logits(self, images, query):
        ...         return self.head(self.network(images))
        >>> Probe(vit.requires_grad_(False), task).logits(torch.zeros(2, 3, 32, 32), None).shape
        torch.Size([2, 4])
    """

    needs_query: ClassVar[bool] = False
    """Whether `query` is given: the feature [B, D] of the untouched backbone on the same image."""

    task: Task
    reference: Reference | None = None
    """Set before `begin`, for methods whose card asks for it."""
    images_beside = 0
    """Images that a step sends through a network beside those of its batch."""

    def __init__(self, network: N, task: Task) -> None:
        super().__init__()
        self.add_module(NETWORK, network)
        self.task = task

    @property
    def network(self) -> N:
        """The pre-trained network; of a method on CLIP, both towers."""
        return getattr(self, NETWORK)

    def adopt(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Before anything is restored: gives tensors the sizes that a `Task` does not tell.

        A class may return, and tasks have different numbers of classes: see `parts/entries.py`.

        Returns:
            What is restored, in today's form.
        """
        return stored

    def begin(self) -> None:
        """Before the first step of a task, after `restore`: copy, orthogonalise, freeze."""

    def begin_epoch(self, epoch: int) -> None:
        """Before the first step of an epoch, from 0; and before going on in the middle of one."""

    def prepare(self, data: TaskImages) -> None:
        """After `begin`, in eval mode: statistics of the task's images that training needs."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; by default all that requires gradients, in one."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def forward(self, images: Tensor, targets: Tensor, query: Tensor | None) -> dict[str, Tensor]:
        """The `loss` to minimise, and its terms by name; each the mean over the batch's rows.

        Args:
            images: [B, 3, h, w], augmented; [B, 0] where the method's card says `images=False`.
            targets: columns [B] int64, all in `task.current`; of a method with exemplars, those of
                earlier tasks have columns of any class seen.
            query: [B, D] if `needs_query`.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """After every step of the optimiser."""

    def finish(self, data: TaskImages) -> None:
        """After the last step of a task, in eval mode: statistics, alignment, prototypes."""

    def join(self, expert: State, data: TaskImages) -> None:
        """Takes in what the expert of its task has learnt, after `restore`; in eval mode.

        Only for independent methods; runs without gradients.

        Args:
            expert: what was stored of the expert, on the CPU.
            data: the task's training images.
        """
        raise NotImplementedError

    def logits(self, images: Tensor, query: Tensor | None) -> Tensor:
        """Scores [B, C] of the classes seen; each row decided on its own.

        The task of an image is not known, and neither are its neighbours in the batch.
        """
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of the adapted backbone, where another method builds on them."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """As always; a frozen backbone stays in eval mode, or its dropout would blur queries."""
        super().train(mode)
        if not any(p.requires_grad for p in self.network.parameters()):
            self.network.eval()
        return self


class Trained(Protocol):
    """A method that trains on images; a frozen keyword-only dataclass.

    A method that keeps exemplars has the fields of `methods/contracts/exemplars.py`: who plans the
    run reads them, and hands over the images of earlier tasks together with the task's own. One
    that must know the number of tasks, or has no room for more than some, has the function of
    `methods/contracts/stream.py`.

    Example:
        >>> method: graftwork.Trained = build("bitfit", {"epochs": 2})
        >>> method.recipe(task).epochs
        2
        >>> type(method.learner(vit.requires_grad_(False), task)).__name__
        'BitFitLearner'
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    card: ClassVar[Card]

    def recipe(self, task: Task) -> Recipe:
        """Recipe by which the task is trained."""
        ...

    def learner(self, network: Any, task: Task, /) -> Learner[Any]:
        """A new learner for a task, before `restore`, on a frozen network of its own.

        Args:
            network: of the kind that the card names.
        """
        ...


class Independent(Trained, Protocol):
    """A trained method whose tasks train side by side; `independent` on its card.

    `recipe` is that of an expert; the learner trains nothing. After a task it holds what `join` has
    made of the experts so far, and predicts.
    """

    def expert(self, vit: VisionTransformer, task: Task, /) -> Learner:
        """A learner that trains on one task alone, on a frozen ViT of its own.

        Tensors that the card calls `shared` are restored in experts of later tasks, and have the
        same names and shapes in expert and learner.
        """
        ...


@dataclass(frozen=True)
class _Experts:
    method: Independent

    @property
    def card(self) -> Card:
        return self.method.card

    def recipe(self, task: Task) -> Recipe:
        return self.method.recipe(task)

    def learner(self, vit: VisionTransformer, task: Task) -> Learner:
        return self.method.expert(vit, task)


def trains(method: Trained) -> Trained:
    """The method that the training loop is given: itself, or the experts of an independent one."""
    if not method.card.independent:
        return method
    # The card says what the type checker cannot see.
    return cast(Trained, _Experts(cast(Independent, method)))


def shared(method: Trained, first: State) -> State:
    """Tensors of the first task that later experts of an independent method start from."""
    return {name: first[name] for name in method.card.shared}


def restore(learner: Learner[Any], state: Mapping[str, Tensor]) -> None:
    """Copies what was stored after the task before; rows that are new since keep their start.

    Raises:
        ValueError: a stored tensor has no place in the learner.
    """
    given = learner.adopt(state)
    own = learner.state_dict(keep_vars=True)
    for name, stored in given.items():
        place = own.get(name)
        if place is None:
            raise ValueError(f"stored tensor {name} {list(stored.shape)} has no place")
        fits = place.shape[1:] == stored.shape[1:] and place.ndim == stored.ndim
        if not fits or (stored.ndim and len(place) < len(stored)):
            raise ValueError(
                f"stored tensor {name} {list(stored.shape)} does not fit {list(place.shape)}"
            )
        with torch.no_grad():
            (place[: len(stored)] if stored.ndim else place).copy_(stored)


def learned(learner: Learner[Any], backbone: Iterable[Tensor]) -> State:
    """Tensors of a learner beyond the untouched backbone: those that are stored after a task.

    Args:
        backbone: tensors of the network as it arrived.
    """
    own = {id(tensor) for tensor in backbone}
    return {
        name: tensor.detach().clone()
        for name, tensor in learner.state_dict(keep_vars=True).items()
        if id(tensor) not in own or tensor.requires_grad
    }
