"""`--dry-run`: every run of a study with its configuration, its command and its estimated cost."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from sward import presets
from sward.config import MASK_METHODS, DistillationConfig, MaskMethod, MaskTrainingConfig, TeacherTrainingConfig
from sward.config_json import to_json
from sward.reproduce.estimates import Estimate, estimate
from sward.reproduce.experiments import Run, teacher_of
from sward.reproduce.study import Study


def describe_plan(study: Study, schedule: Iterable[tuple[Run, int]]) -> str:
    """Return one paragraph per run, in order of execution, and the total cost of the runs that are not finished."""
    lines: list[str] = []
    total = left = 0
    for run, seed in schedule:
        try:
            state: str = study.state(run, seed)
        except ValueError as error:
            state = f"blocked: {error}"
        config = study.config(run, seed)
        cost = estimate(config, presets.get(teacher_of(run.preset).preset).teacher)
        total += cost.flops
        left += 0 if state == "finished" else cost.flops
        lines += [
            f"{run.preset}/{study.folder(run, seed).path.name}: {state}",
            f"  {_cost(cost, config)}",
            f"  {_setting(config)}",
        ]
        if isinstance(config, TeacherTrainingConfig) and config.trunk_checkpoint is not None:
            there = "" if config.trunk_checkpoint.exists() else " (missing)"
            lines.append(f"  trunk {config.trunk_checkpoint}{there}")
        if run.distillation in MASK_METHODS and seed == 0:
            method: MaskMethod = "maskd" if run.distillation == "maskd" else "freekd"
            lines.append(f"  first: {_masks_command(study.masks_config(run, method))}")
        lines.append(f"  {_command(config)}")
    lines.append(f"all runs: {_flops(total)}, of which {_flops(left)} remain")
    lines.append(
        "FLOPs: matrix products of the networks over all steps, backward counted twice; memory: weights, gradients, "
        "AdamW moments and saved activations in fp32; both without the losses"
    )
    return "\n".join(lines)


def _cost(cost: Estimate, config: DistillationConfig | TeacherTrainingConfig) -> str:
    uncounted = isinstance(config, DistillationConfig) and config.unlabelled and config.unlabelled_batch is None
    most = "estimates for as many unlabelled as labelled images, the most it takes" if uncounted else "estimates"
    return f"{cost.steps:,} steps, {_flops(cost.flops)}, {cost.memory / 1e9:.2f} GB ({most})"


def _flops(number: int) -> str:
    for unit, name in ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs")):
        if number >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number / 1e9:,.2f} GFLOPs"


def _setting(config: DistillationConfig | TeacherTrainingConfig) -> str:
    height, width = config.dataset.image_size
    length = f"{config.iterations} iterations" if config.epochs is None else f"{config.epochs} epochs"
    rate = config.optimizer
    return (
        f"{config.model} on {config.dataset.name} at {height}x{width}, batch {config.batch}, {length}, "
        f"AdamW {rate.lr:g}, weight decay {rate.weight_decay:g}, {rate.schedule}, seed {config.seed}"
    )


def _command(config: DistillationConfig | TeacherTrainingConfig) -> str:
    """Return the command that trains the same run."""
    preset = presets.get(config.preset)
    is_teacher = isinstance(config, TeacherTrainingConfig)
    default = preset.teacher if is_teacher else preset.student
    flags = _flags(json.loads(to_json(default)), json.loads(to_json(config)))
    return shlex.join(["sward", "train-teacher" if is_teacher else "train", config.preset, *flags])


def _masks_command(config: MaskTrainingConfig) -> str:
    default = dataclasses.replace(presets.get(config.preset).masks, method=config.method)
    flags = ["--method", config.method, *_flags(json.loads(to_json(default)), json.loads(to_json(config)))]
    return shlex.join(["sward", "train-masks", config.preset, *flags])


def _flags(default: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in wanted.items():
        if isinstance(value, dict) and isinstance(default.get(name), dict):
            yield from _flags(default[name], value, f"{prefix}{name}.")
        elif value != default.get(name):
            flag = f"{prefix}{name}".replace("_", "-")
            if isinstance(value, bool):
                *path, last = flag.split(".")
                yield f"--{'.'.join([*path, last if value else f'no-{last}'])}"
            else:
                yield f"--{flag}"
                yield from (str(each) for each in (value if isinstance(value, list) else [value]))
