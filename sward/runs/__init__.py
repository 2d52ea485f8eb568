"""Whole runs: the functions behind `sward train`, `train-teacher`, `train-masks` and `evaluate`."""

from sward.runs.distillation import LoadedDistillation, load_distillation
from sward.runs.evaluate import evaluate_run, evaluation_file, frames_of
from sward.runs.load import load_run
from sward.runs.train import train_masks, train_student, train_teacher

__all__ = [
    "LoadedDistillation",
    "evaluate_run",
    "evaluation_file",
    "frames_of",
    "load_distillation",
    "load_run",
    "train_masks",
    "train_student",
    "train_teacher",
]
