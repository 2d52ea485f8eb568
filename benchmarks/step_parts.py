"""Where the time of a SWARD training step goes on a CPU: every part beside the student's own forward and backward pass.

    SWARD_DATA=/datasets python benchmarks/step_parts.py
    SWARD_DATA=/datasets python benchmarks/step_parts.py --threads 1 --clock cpu      # on a machine that others use
    SWARD_DATA=/datasets python benchmarks/step_parts.py --preset clinicdb-unext --recipe paper

The presets are those of two cores and `clinicdb-unext` at 256x256, batch 8, with the teacher's trunk features in the
cache. Parts are timed in turn, round by round, and the fastest round counts. "Windowed distillation" includes what MWAD
projects inside it. `--clock cpu` counts the processor time of this thread instead of the time of day. Writes
`benchmarks/results/step_parts.csv` for all presets with the recommended recipe.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from harness import Session
from sward import data, methods, models, presets
from sward.alignment import Standardization, aligned_size
from sward.losses import PDRLoss, SegmentationCrossEntropy, SWARDDistillation
from sward.losses.recipes import RecipeName
from sward.runs.distillation import distillation_pair
from sward.training import FrozenTeacher, TrainingStep
from sward.training.teacher_cache import TrunkCache

RESULTS = Path(__file__).parent / "results"
CASES = {"clinicdb-small": (128, 128), "colondb-small": (128, 128), "clinicdb-unext": (256, 256)}
BATCH = 8
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
Parts = dict[str, Callable[[], object]]


def fastest(parts: Parts, clock: Callable[[], float], seconds: float) -> dict[str, float]:
    """The fastest round of each part in milliseconds; at least three rounds."""
    times = dict.fromkeys(parts, float("inf"))
    for run in parts.values():
        run()
    started = time.perf_counter()
    rounds = 0
    while rounds < 3 or time.perf_counter() - started < seconds:
        for name, run in parts.items():
            begun = clock()
            run()
            times[name] = min(times[name], 1e3 * (clock() - begun))
        rounds += 1
    return times


def parts_of(preset: str, recipe: RecipeName, size: tuple[int, int], folder: Path) -> Parts:
    """Return what is timed, by name."""
    options = presets.get(preset).teacher.model_options
    config = presets.get(preset).student
    config.use_recipe(recipe)
    if size != tuple(config.dataset.image_size):
        config.teacher.image_size = None
    config.dataset.image_size, config.batch = size, BATCH
    teacher_size = config.teacher_image_size
    info = data.describe(config.dataset.name)
    dataset = data.build(
        config.dataset.name,
        "train",
        train=True,
        image_size=size,
        split_by=config.dataset.split_by,
        packed="none",
        views=config.dataset.views,
        teacher_size=teacher_size if teacher_size != size else None,
    )
    torch.manual_seed(0)
    student: nn.Module = models.build(config.model, info.num_classes)
    network = models.build(config.teacher.name, info.num_classes, **options)
    loss = methods.build("sward", distillation_pair(config, student, config.teacher.name, network, info))
    assert isinstance(loss, SWARDDistillation)
    step = TrainingStep(student, SegmentationCrossEntropy(info.ignore_index), loss).train()
    learnable = [parameter for parameter in step.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnable, lr=1e-4, fused=True)

    def load() -> data.Batch:
        return data.collate_training([dataset[index] for index in range(BATCH)])

    images, labels, _, teacher_images = load()
    views = images if teacher_images is None else teacher_images
    assert isinstance(network, models.teachers.Teacher)
    cache = network.trunk_cache = TrunkCache(network.trunk, folder)
    teacher = FrozenTeacher(network, loss.teacher_taps, dtype=torch.float32)
    features = teacher(views)
    student(images)
    taps = {name: each.detach().requires_grad_() for name, each in step.taps.collect().items()}
    own = [taps[tap] for tap in loss.stage_taps]
    theirs = [features[tap] for tap in loss.teacher_taps]
    mwad, stages = loss.mwad, range(len(own))
    sizes = [aligned_size(*pair) for pair in zip(own, theirs, strict=True)]
    operations = [mwad._operation(index, own[index], theirs[index])[0] for index in stages]
    pdr, normalised_pdr = (
        PDRLoss(info.num_classes, normalize=normalize, ignore_index=info.ignore_index) for normalize in (False, True)
    )

    def standardizations() -> list[Standardization]:
        return [each for each in mwad.standardization if isinstance(each, Standardization)]

    def project() -> list[tuple[Tensor, ...]]:
        return [mwad._operation(index, own[index], theirs[index])[1] for index in stages]

    operands = [[each.detach().requires_grad_(each.requires_grad) for each in stage] for stage in project()]
    upstream = [[torch.randn_like(each) for each in stage] for stage in operands]

    def project_and_back() -> None:
        pairs = [pair for stage in zip(project(), upstream, strict=True) for pair in zip(*stage, strict=True)]
        made = [pair for pair in pairs if pair[0].grad_fn is not None]
        torch.autograd.backward([each for each, _ in made], [above for _, above in made])

    def windows() -> None:
        results = [operations[index](*operands[index], mwad.window_size[index], (3, 3)) for index in stages]
        torch.stack([result.loss for result in results]).sum().backward()

    def whole_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(images, labels, features)[0].backward()
        optimizer.step()

    def standardize() -> None:
        for each, maps, grid in zip(standardizations(), theirs, sizes):
            each.normalize(maps, grid)

    whole_step()
    return {
        "student": lambda: step.task(student(images), labels).backward(),
        "load a batch": load,
        "read the cache": lambda: cache(views),
        "teacher": lambda: teacher(views),
        "MWAD": lambda: mwad(own, theirs).loss.backward(),
        "  teacher's statistics": lambda: [
            each.update(maps) for each, maps in zip(standardizations(), theirs, strict=False)
        ],
        "  teacher standardised, resized": standardize,
        "  projected (with the above)": project_and_back,
        "  windowed distillation": windows,
        "PDR": lambda: pdr(taps[loss.pdr_tap], labels).loss.backward(),
        "normalised PDR": lambda: normalised_pdr(taps[loss.pdr_tap], labels).loss.backward(),
        "optimiser": optimizer.step,
        "step, with features": whole_step,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case (default: 20)")
    parser.add_argument("--preset", choices=CASES, help="default: all")
    parser.add_argument("--recipe", choices=get_args(RecipeName), default="recommended")
    options = parser.parse_args()
    if "SWARD_DATA" not in os.environ:
        parser.error("SWARD_DATA must name the folder of the data sets, got nothing")
    torch.set_num_threads(options.threads)
    session = Session("step_parts", torch.device("cpu"))
    rows = []
    for preset, size in CASES.items():
        if options.preset not in (None, preset):
            continue
        with tempfile.TemporaryDirectory(prefix="sward-step-parts-") as folder:
            times = fastest(
                parts_of(preset, options.recipe, size, Path(folder)), CLOCKS[options.clock], options.seconds
            )
        case = f"{preset}, {size[0]}x{size[1]}, batch {BATCH}"
        print(f"\n{case}\n  {'part':<36}{'ms':>9}{'of the student':>16}")
        for part, milliseconds in times.items():
            share = milliseconds / times["student"]
            print(f"  {part:<36}{milliseconds:>9.1f}{share:>15.1%}")
            rows.append(
                (session.device_name, torch.__version__, options.clock, case, part.strip(), milliseconds, share)
            )
    if options.preset is not None or options.recipe != "recommended":
        return 0
    path = RESULTS / "step_parts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("device", "torch", "clock", "case", "part", "milliseconds", "share_of_student"))
        writer.writerows((*row[:-2], f"{row[-2]:.3f}", f"{row[-1]:.4f}") for row in rows)
    print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
