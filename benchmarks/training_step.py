"""The cost of one training step: data, teacher, student, each loss, backward pass, optimiser, and peak memory.

    python benchmarks/training_step.py                             # shapes that fit two cores
    python benchmarks/training_step.py --preset clinicdb-unext --image-size 256 256 --batch 8
    python benchmarks/training_step.py --preset clinicdb-small --distillation cirkd

`student` is the forward pass, the task loss and their backward pass, what training without a teacher would do. Each
distillation loss is timed alone, forward and backward, from the student's maps; `share` is their sum over `student`.
Teacher features are computed once, as they are with `--teacher.cache`; the teacher's own time stands beside, and that
of reading them from the cache. `step` is everything a training step does with such features, data excluded, and
`memory` the most it has alive at once beyond weights, optimiser and batch. Runs on the GPU when there is one. Rows go
to `benchmarks/results/training_step_*.csv`, in place of earlier rows of the same device, threads, shapes and method.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import Session, device_of, peak_extra_bytes, require_positive
from result_rows import merge_rows
from sward import data, methods, models, presets
from sward.config import DistillationConfig
from sward.losses import LOGITS, DistillationInputs, DistillationLoss, SegmentationCrossEntropy, SWARDDistillation
from sward.runs.distillation import distillation_pair
from sward.runs.load import build_datasets
from sward.training import FrozenTeacher, TrainingStep, first_state
from sward.training.teacher_cache import TeacherCache

RESULTS = Path(__file__).parent / "results"


class Shape(NamedTuple):
    preset: str
    image_size: tuple[int, int]
    batch: int


# The presets' own shapes where two cores take seconds for them, smaller ones where they would take minutes.
SHAPES = (
    Shape("demo", (64, 64), 8),
    Shape("clinicdb-small", (128, 128), 8),
    Shape("camvid-small", (128, 160), 4),
    Shape("clinicdb-unext", (256, 256), 8),
    Shape("clinicdb-resunetpp", (256, 256), 2),
    Shape("cityscapes-mbv3", (256, 512), 2),
)


class Clock:
    """Measures the median seconds of a call; on a GPU up to the end of what it launched."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def __call__(self, run: Callable[[], object], rounds: int | None = None) -> float:
        run()
        times = []
        for _ in range(rounds or self.rounds):
            self._wait()
            started = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def load_batch(config: DistillationConfig) -> Callable[[], object] | None:
    """Return a function that assembles a batch in this process, with the teacher's views; None without the data set."""
    try:
        train_set, _ = build_datasets(config)
    except FileNotFoundError:
        return None
    return lambda: data.collate_training([train_set[index] for index in range(config.batch)])


def losses_of(loss: DistillationLoss, inputs: DistillationInputs, method: str) -> dict[str, Callable[[], Tensor]]:
    """Return what can be timed alone: MWAD and PDR of SWARD, any other distillation loss as a whole."""
    if not isinstance(loss, SWARDDistillation):
        return {method: lambda: loss(inputs).loss}
    student = [inputs.student[tap] for tap in loss.stage_taps]
    teacher = [inputs.teacher[tap] for tap in loss.teacher_taps]
    parts = {
        "mwad": lambda: loss.mwad(student, teacher).loss,
        "pdr": lambda: loss.pdr(inputs.student[loss.pdr_tap], inputs.labels).loss,
    }
    return {name: part for (name, part), weight in zip(parts.items(), loss.weights, strict=True) if weight}


def _backward(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def measure(shape: Shape, method: str, device: torch.device, rounds: int) -> dict[str, float | str]:
    """Return the milliseconds of each part, the share of distillation, and the peak memory of a step in MiB."""
    preset = presets.get(shape.preset)
    config = preset.student
    config.distillation = method
    if shape.image_size != config.dataset.image_size:
        config.teacher.image_size = None
    config.dataset.image_size, config.batch = shape.image_size, shape.batch
    info = data.describe(config.dataset.name)
    torch.manual_seed(0)
    student: nn.Module = models.build(config.model, info.num_classes).to(device)
    network = models.build(config.teacher.name, info.num_classes, **preset.teacher.model_options).to(device)
    pair = distillation_pair(config, student, config.teacher.name, network, info)
    loss = methods.build(method, pair).to(device)
    teacher = FrozenTeacher(network, loss.teacher_taps)
    task = SegmentationCrossEntropy(info.ignore_index)
    step = TrainingStep(student, task, loss).train()
    optimizer = first_state(step, config, images=shape.batch).optimizer

    images = torch.randn(shape.batch, 3, *shape.image_size, device=device)
    # Regions of 32 pixels, as labels have regions.
    cells = torch.randint(info.num_classes, (shape.batch, *(side // 32 for side in shape.image_size)), device=device)
    labels = cells.repeat_interleave(32, 1).repeat_interleave(32, 2)
    views = F.interpolate(images, config.teacher_image_size, mode="bilinear")
    features = teacher(views)
    logits = student(images)
    maps = {name: each.detach().requires_grad_() for name, each in step.taps.collect().items()}
    inputs = DistillationInputs({**maps, LOGITS: logits.detach().requires_grad_()}, features, labels)

    def student_alone() -> None:
        task(student(images), labels).backward()

    def whole_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(images, labels, features)[0].backward()
        optimizer.step()

    clock = Clock(device, rounds)
    batch = load_batch(config)
    row: dict[str, float | str] = {"data": "" if batch is None else 1e3 * clock(batch)}
    row["teacher"] = 1e3 * clock(lambda: teacher(views), rounds=2)
    with tempfile.TemporaryDirectory(prefix="sward-training-step-") as folder:
        cache = TeacherCache(teacher, Path(folder))
        row["teacher cached"] = 1e3 * clock(lambda: cache(views))
    with torch.no_grad():
        row["student forward"] = 1e3 * clock(lambda: student(images))
        row["task loss"] = 1e3 * clock(lambda: task(logits, labels))
    row["student"] = 1e3 * clock(student_alone)
    shares = []
    for name, run in losses_of(loss, inputs, method).items():
        row[f"{name} forward"] = 1e3 * clock(run)
        # With the graph of the forward pass: a loss that works out its gradient there would look free otherwise.
        shares.append(1e3 * clock(functools.partial(_backward, run)))
        row[name] = shares[-1]
    row["distillation"] = sum(shares)
    row["share"] = sum(shares) / float(row["student"])
    whole_step()
    row["optimizer"] = 1e3 * clock(optimizer.step)
    row["step"] = 1e3 * clock(whole_step)
    optimizer.zero_grad(set_to_none=True)  # freed during the step, gradients of the one before would hide others
    row["memory"] = peak_extra_bytes(whole_step, device) / 2**20
    return row


def show(shape: Shape, method: str, row: dict[str, float | str]) -> None:
    height, width = shape.image_size
    print(f"\n{shape.preset}, {height}x{width}, batch {shape.batch}, {method}")
    for name, value in row.items():
        if value == "":
            print(f"  {name:<18}{'no data':>12}")
        elif name == "share":
            print(f"  {name:<18}{100 * float(value):>10.1f} %   of the student's own forward and backward")
        else:
            print(f"  {name:<18}{float(value):>10.1f} {'MiB' if name == 'memory' else 'ms'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=presets.names(), help="one preset instead of all shapes")
    parser.add_argument("--image-size", type=int, nargs=2, help="with --preset; the preset's own by default")
    parser.add_argument("--batch", type=int, help="with --preset; the preset's own by default")
    parser.add_argument("--distillation", default="sward", choices=sorted({*methods.METHODS} - {"maskd", "freekd"}))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    require_positive(parser, options, "image_size", "batch", "rounds")
    if options.preset is None and (options.image_size or options.batch):
        parser.error("--image-size and --batch need --preset")
    if any(side % 32 for side in options.image_size or ()):
        parser.error(f"--image-size must be multiples of 32, got {' '.join(map(str, options.image_size))}")
    device = device_of(parser, options.device)

    shapes: tuple[Shape, ...] = SHAPES
    if options.preset:
        student = presets.get(options.preset).student
        height, width = options.image_size or student.dataset.image_size
        shapes = (Shape(options.preset, (height, width), options.batch or student.batch),)
    session = Session("training_step", device)
    print(f"{session.benchmark} on {session.device_name} (torch {torch.__version__}), fp32, {options.rounds} rounds")
    if "SWARD_DATA" not in os.environ:
        print("set SWARD_DATA to the folder of the data sets to see what loading a batch costs")
    rows = []
    for shape in shapes:
        row = measure(shape, options.distillation, session.device, options.rounds)
        show(shape, options.distillation, row)
        case = dict(
            device=session.device_name,
            torch=torch.__version__,
            preset=shape.preset,
            image_size="x".join(map(str, shape.image_size)),
            batch=shape.batch,
            distillation=options.distillation,
        )
        for part, value in row.items():
            rows.append(dict(**case, part=part, value=f"{value:.4f}" if isinstance(value, float) else value))
    path = RESULTS / f"training_step_{session.device.type}.csv"
    merge_rows(path, rows, key=("device", "preset", "image_size", "batch", "distillation"))
    print(f"\nwrote {path}; milliseconds, share as a fraction, memory in MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
