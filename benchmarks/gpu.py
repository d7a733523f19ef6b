"""The methods on a GPU: agreement with the CPU, images per second, share of the GPU's peak.

    python benchmarks/gpu.py [--methods A,B] [--model NAME] [--batch N] [--steps N]
        [--check-model NAME] [--seconds N]

Peak: bf16 products of matrices of 8192, on random numbers. Utilisation: floating-point operations
of the matrix products and attentions of a step, as torch counts them, per second, as a share of
the peak. Steps are those of the training loop on ready tensors, bf16, with the augmentation for
which queries are computed; beside it the bare loop of `benchmarks/training.py`. Extraction: the
forward pass under which features are extracted.

Agreement: one forward and backward pass of the learner in eval mode, same start and images, on the
CPU in fp32, and on the GPU in fp32 and bf16; relative errors of loss, logits and all gradients
together.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import training

from graftwork import methods
from graftwork.operators.backbones import loading
from graftwork.operators.stages import features
from graftwork.operators.training import loop
from graftwork.operators.training.forward import frozen_features
from graftwork.operators.training.settings import Settings

LIMIT = 1e-3
"""Relative error up to which fp32 on both devices counts as the same."""


def peak() -> float:
    """Operations per second of bf16 matrix products."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, 20)


def seconds(work: Callable[[], object], count: int) -> float:
    """Mean time of a piece of work on the GPU, after three that do not count."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def flops(work: Callable[[], object]) -> int:
    """Operations of a piece of work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def extraction(model: str, batch: int, most: float) -> str:
    """A row: the forward pass of the frozen backbone."""
    network = loading.load(model, "random", "token").to("cuda")
    embed = loading.embedder(network, "token")
    images = torch.randn(batch, 3, 224, 224, device="cuda")

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            embed(images)

    rate = batch / seconds(forward, 20)
    used = rate * flops(forward) / batch / most
    return f"| extraction, batch {batch} | {rate:.0f} | | | {used:.1%} |"


def steps(case: training.Case, batch: int, count: int, pixels: Tensor, most: float) -> str:
    """A row: the training loop and the bare one, in turn by halves."""
    case = case.augmented("flip")
    targets = torch.arange(batch * count) % training.CLASSES
    bare = training.Bare(case)
    on_gpu, columns = pixels.to("cuda"), targets[:batch].to("cuda")

    def step() -> None:
        bare.step(on_gpu, columns, None)

    operations = flops(step)
    theirs = [seconds(step, count)]
    marks: list[float] = []

    def after() -> None:
        torch.cuda.synchronize()
        marks.append(time.perf_counter())

    images = training.Ready(on_gpu, targets, None)
    training.train(case, images, count, after)
    theirs.append(seconds(step, count))
    ours = (marks[-1] - marks[3]) / (len(marks) - 4)
    free = sum(theirs) / 2
    used = operations / ours / most
    memory = torch.cuda.max_memory_allocated() / 2**30
    rates = f"{batch / ours:.0f} | {batch / free:.0f} | {free / ours:.3f}"
    return f"| {case.label} | {rates} | {used:.1%} | {memory:.1f} |"


def agreement(case: training.Case, pixels: Tensor) -> str:
    """A row: relative errors against the CPU in fp32."""
    targets = torch.arange(len(pixels)) % training.CLASSES
    wanted = passes(case, pixels, targets, "cpu", "fp32")
    cells = []
    for precision in ("fp32", "bf16"):
        found = passes(case, pixels, targets, "cuda", precision)
        errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
        flag = " **differs**" if precision == "fp32" and max(errors) > LIMIT else ""
        same = (found[1].argmax(1) == wanted[1].argmax(1)).float().mean()
        cells.append(" ".join(f"{e:.1e}" for e in errors) + f" {same:.0%}{flag}")
    return f"| {case.label} | {' | '.join(cells)} |"


def passes(
    case: training.Case, pixels: Tensor, targets: Tensor, device: str, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits and gradients of a learner at its start, on the CPU."""
    settings = replace(case.settings, device=device, precision=precision)
    learner, _ = loop.open_learner(case.method, case.vit(), training.TASK, None, settings)
    learner.begin()
    learner.eval()
    inputs, columns = pixels.to(device), targets.to(device)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        query = frozen_features(learner.network, inputs) if learner.needs_query else None
        loss = learner(inputs, columns, query)["loss"]
    loss.backward()
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
    logits = torch.ones(1, 1)  # an expert has none of its own
    if not methods.load(case.name).card.independent:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = learner.logits(inputs, query)
    flat = torch.cat([g.double().flatten() for g in gradients])
    return loss.detach().double().cpu(), logits.double().cpu(), flat.cpu()


def relative(found: Tensor, wanted: Tensor) -> float:
    """Of what is finite: some methods rule classes out with infinity until a task is finished."""
    keep = wanted.isfinite()
    if not torch.equal(keep, found.isfinite()):
        return float("inf")
    return float((found[keep] - wanted[keep]).norm() / wanted[keep].norm())


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--methods", default="")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--check-model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds
    torch.manual_seed(0)
    wanted = [m for m in options.methods.split(",") if m]
    most = peak()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {most / 1e12:.0f} TFLOP/s")
    print(f"\n{options.model}, bf16\n\n| step | images/s | bare | ratio | of the peak | GiB |")
    print("|---|---|---|---|---|---|")
    for batch in (128, features.BATCH_SIZES["cuda"]):
        print(extraction(options.model, batch, most), flush=True)
    torch.backends.cudnn.allow_tf32 = False  # as in a run
    settings = Settings(seed=0, device="cuda", precision="bf16", decoders=2)
    network = loading.load(options.model, "random", "token")
    pixels = torch.randn(options.batch, 3, 224, 224)
    for case in training.cases(wanted, options.batch, network, settings):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        report(lambda: steps(case, options.batch, options.steps, pixels, most), case, ends)  # noqa: B023
    network = loading.load(options.check_model, "random", "token", 112)
    few = torch.randn(8, 3, 112, 112)
    print(f"\n{options.check_model}, 112 pixels, 8 images: loss, logits, gradients, same class\n")
    print("| method | fp32 on the GPU | bf16 on the GPU |\n|---|---|---|")
    for case in training.cases(wanted, 8, network, settings):
        report(lambda: agreement(case, few), case, ends)  # noqa: B023


def report(work: Callable[[], str], case: training.Case, ends: float) -> None:
    """Prints a row, or why there is none; one method's failure does not end the others."""
    if time.monotonic() > ends:
        print(f"| {case.label} | no time left |")
        return
    try:
        print(work(), flush=True)
    except Exception:
        print(f"| {case.label} | failed |\n{traceback.format_exc()}", flush=True)


if __name__ == "__main__":
    main()
