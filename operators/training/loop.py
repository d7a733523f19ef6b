"""The training loop of all trained methods: one task, on tensors, without store or Ray.

Called on every worker of a group at once (torch.distributed), or alone. All random numbers come
from seeds derived from (run, task, epoch, step): neither the number of workers nor an interruption
changes what is drawn.

Shapes: B batch, N rows of a task, D width.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import (
    Learner,
    Recipe,
    Reference,
    Task,
    Trained,
    learned,
    restore,
)
from graftwork.methods.networks.network import Network
from graftwork.operators.backbones.loading import autocast
from graftwork.operators.errors import Diverged
from graftwork.operators.parameters.training import SinglePass
from graftwork.operators.seeds import derive
from graftwork.operators.training.batches import once, prepared, row_batches
from graftwork.operators.training.forward import PlainImages, query_of
from graftwork.operators.training.settings import Images, Log, Settings, Snapshot, World


def open_learner(
    method: Trained, network: Network, task: Task, state: State | None, settings: Settings
) -> tuple[Learner, list[Tensor]]:
    """A learner for a task on a network of its own, with what was stored, on the device.

    Args:
        network: changed by this; as loaded.
        state: stored after the task before; None at the start.

    Returns:
        The learner, and the backbone's own tensors, which stay known although a method may replace
        a module.
    """
    network.requires_grad_(False)
    network.to(settings.device)
    backbone = list(network.state_dict(keep_vars=True).values())
    torch.manual_seed(derive(settings.seed, "task", task.index))
    learner = method.learner(network, task).to(settings.device)
    if state is not None:
        restore(learner, state)
    return learner, backbone


def train_task(
    method: Trained,
    network: Network,
    task: Task,
    images: Images,
    state: State | None,
    settings: Settings,
    *,
    single: SinglePass | None = None,
    reference: Reference | None = None,
    resume: Snapshot | None = None,
    keep: Callable[[Snapshot], None] = lambda snapshot: None,
    say: Callable[..., None] = lambda **facts: None,
) -> tuple[State, Log]:
    """Trains one task: create, restore, begin, wrap in DDP, compile, prepare, train, finish.

    Args:
        method: the method; of an independent one its experts; see `trained.trains`.
        network: the ViT or CLIP as loaded, for this task alone.
        task: what the method may know of the task.
        images: the task's training images.
        state: stored after the task before, None at the start; for an expert what it shares.
        settings: seed, device, precision and the like.
        single: of an online stream, the pass over its images; None for the recipe's epochs.
        reference: images and texts of no task, for methods that ask for them.
        resume: continue here.
        keep: called with a snapshot now and then, on rank 0.
        say: called with facts for people after every step, on rank 0.

    Returns:
        What is stored after the task, and the log.

    Raises:
        Diverged: a loss or a gradient is NaN or infinite; the step is not taken.
    """
    world, recipe = World.current(), method.recipe(task)
    if single is not None:
        recipe = once(recipe, single)
    learner, backbone = open_learner(method, network, task, state, settings)
    learner.reference = reference
    learner.begin()
    run = _Run(learner, backbone, recipe, images, settings, world)
    plain = PlainImages(learner, images, settings, run.log, recipe)
    learner.eval().prepare(plain)
    if resume is not None:
        run.resume(resume)
    kept = time.monotonic()
    for facts in run.steps():
        if world.rank == 0:
            say(**facts)
            if time.monotonic() - kept >= settings.every:
                keep(run.snapshot())
                kept = time.monotonic()
    learner.eval()
    torch.manual_seed(derive(settings.seed, "finish", task.index))
    learner.finish(plain)
    return learned(learner, backbone), run.log


def join_task(
    method: Trained,
    network: Network,
    task: Task,
    images: Images,
    before: State | None,
    expert: State,
    settings: Settings,
) -> tuple[State, Log]:
    """Joins the expert of a task of an independent method to those before.

    Args:
        before: stored after the task before was joined; None at the start.
        expert: stored of the task's expert.

    Returns:
        What is stored after the task, and the log.
    """
    learner, backbone = open_learner(method, network, task, before, settings)
    learner.eval()
    log = Log()
    torch.manual_seed(derive(settings.seed, "join", task.index))
    with torch.no_grad():
        given = PlainImages(learner, images, settings, log, method.recipe(task))
        learner.join(expert, given)
    return learned(learner, backbone), log


class _Run:
    """The state of a task's training between two steps."""

    def __init__(
        self,
        learner: Learner,
        backbone: list[Tensor],
        recipe: Recipe,
        images: Images,
        settings: Settings,
        world: World,
    ) -> None:
        self.log = Log(trainable=sum(p.numel() for p in learner.parameters() if p.requires_grad))
        self._learner, self._backbone, self._recipe = learner, backbone, recipe
        self._images, self._settings, self._world = images, settings, world
        self._optimizer = recipe.optimizer(learner.groups())
        for group in self._optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self._parameters = [p for g in self._optimizer.param_groups for p in g["params"]]
        self._forward: Any = learner
        if world.size > 1:
            # Which rows of a pool are used, and so which tensors get a gradient, may differ.
            # Buffers are the same on all workers, and may be as large as a class's covariances.
            self._forward = DistributedDataParallel(
                learner, find_unused_parameters=True, broadcast_buffers=False
            )
        if settings.compile:
            self._forward = torch.compile(self._forward)
        self._epoch = self._step = 0
        self._sums: dict[str, float] = {}

    def steps(self) -> Iterator[dict[str, Any]]:
        """Takes all steps that are left; facts for people after each."""
        recipe, task = self._recipe, self._learner.task
        self._learner.train()
        while self._epoch < recipe.epochs:
            factor = recipe.schedule(self._epoch, recipe.epochs)
            self._learner.begin_epoch(self._epoch)
            drawn = row_batches(
                len(self._images.targets), recipe, self._settings.seed, task.index, self._epoch
            )
            batches = [rows for rows in drawn for _ in range(recipe.times)]
            started, done = time.monotonic(), 0
            for rows, pixels in self._prepared(batches):
                self._set_rate(factor, len(batches))
                terms = self._take(rows, pixels)
                for name, value in terms.items():
                    self._sums[name] = self._sums.get(name, 0.0) + value * len(rows)
                self._step += 1
                done += len(rows)
                # After the counters: a snapshot taken now continues with the next step.
                yield {
                    "epoch": self._epoch + 1,
                    "epochs": recipe.epochs,
                    "step": self._step,
                    "steps": len(batches),
                    "loss": terms["loss"],
                    "images_per_second": done / (time.monotonic() - started + 1e-9),
                }
            count = sum(map(len, batches))
            self.log.epochs.append({name: s / count for name, s in self._sums.items()})
            self._epoch, self._step, self._sums = self._epoch + 1, 0, {}

    def _set_rate(self, factor: float, steps: int) -> None:
        """Sets every group's learning rate for the next step, of an epoch with so many steps."""
        if (schedule := self._recipe.step_schedule) is not None:
            factor *= schedule(self.log.steps, self._recipe.epochs * steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def snapshot(self) -> Snapshot:
        """Everything that the next steps depend on."""
        tensors = learned(self._learner, self._backbone)
        for number, state in self._optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    tensors[f"optimizer/{number}/{name}"] = torch.as_tensor(value).clone()
        return Snapshot(
            epoch=self._epoch,
            step=self._step,
            tensors=tensors,
            log=list(self.log.epochs),
            sums=dict(self._sums),
            counts=[self.log.steps, self.log.images_forwarded],
        )

    def resume(self, snapshot: Snapshot) -> None:
        """Continues where a snapshot was taken."""
        own = {k: v for k, v in snapshot.tensors.items() if not k.startswith("optimizer/")}
        restore(self._learner, own)
        whole = self._optimizer.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in snapshot.tensors.items():
            if name.startswith("optimizer/"):
                _, number, short = name.split("/")
                states.setdefault(int(number), {})[short] = value
        self._optimizer.load_state_dict({**whole, "state": states})
        self._epoch, self._step = snapshot.epoch, snapshot.step
        self.log.epochs = list(snapshot.log)
        self._sums = dict(snapshot.sums)
        self.log.steps, self.log.images_forwarded = snapshot.counts

    def _prepared(self, batches: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of the steps that are left, with this worker's pixels, prepared ahead."""
        times, steps = self._recipe.times, range(self._step, len(batches))
        left = [batches[step] for step in steps]
        draws = [self._epoch * times + step % times for step in steps]
        mine, augmentation = map(self._mine, left), self._recipe.augmentation
        found = prepared(self._images, mine, self._settings, draws, augmentation)
        return ((rows, pixels) for rows, (_, pixels) in zip(left, found, strict=True))

    def _mine(self, rows: list[int]) -> list[int]:
        # A worker without a row takes part with the first one, which then counts nothing.
        return rows[self._world.rank :: self._world.size] or rows[:1]

    def _take(self, rows: list[int], pixels: Tensor) -> dict[str, float]:
        """One step: the terms of the loss, means over the whole batch."""
        settings, world, mine = self._settings, self._world, self._mine(rows)
        device = settings.device
        seed_generators(
            derive(settings.seed, "step", self._learner.task.index, self._epoch, self._step)
            + world.rank,
            device,
        )
        inputs = self._images.normalise(pixels.to(device, non_blocking=True))
        targets = self._images.targets[mine].to(device)
        with autocast(device, settings.precision):
            query = query_of(self._learner, self._known_query(), mine, inputs)
            terms = self._forward(inputs, targets, query)
        counted = len(rows[world.rank :: world.size])
        # Means of unequal parts: DDP averages the workers' gradients with equal weights.
        weight = counted * world.size / len(rows)
        self._optimizer.zero_grad(set_to_none=True)
        (terms["loss"] * weight).backward()
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._recipe.clip:
            clip_grads_with_norm_(self._parameters, self._recipe.clip, norm)
        values = torch.stack([terms[name].detach().float() * weight for name in terms])
        if world.size > 1:
            dist.all_reduce(values)
            values /= world.size
        if not bool(torch.isfinite(torch.cat([values.to(norm.device), norm.float()[None]])).all()):
            self._diverged(rows, dict(zip(terms, values.tolist(), strict=True)), float(norm))
        self._optimizer.step()
        self._learner.after_step()
        self.log.steps += 1
        passes = 1 + (self._learner.needs_query and self._known_query() is None)
        self.log.images_forwarded += passes * len(rows) + self._learner.images_beside
        return dict(zip(terms, values.tolist(), strict=True))

    def _known_query(self) -> Tensor | None:
        return self._images.query if self._recipe.augmentation == "none" else None

    def _diverged(self, rows: list[int], terms: dict[str, float], norm: float) -> None:
        what = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        names = ", ".join(self._images.name(row) for row in rows[:4])
        more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        raise Diverged(
            f"task {self._learner.task.index}, epoch {self._epoch + 1}, step {self._step + 1}: "
            f"{what}, gradient norm {norm:g}; lower lr; images: {names}{more}"
        )


def seed_generators(seed: int, device: str) -> None:
    """Seeds the CPU and a device as `torch.manual_seed` does, without a stack trace for each."""
    torch.default_generator.manual_seed(seed)
    if device != "cpu":
        torch.cuda.manual_seed_all(seed)
