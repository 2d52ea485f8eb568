"""The training loop and its parts."""

from sward.training.batches import EpochSampler
from sward.training.host_memory import keep_freed_memory
from sward.training.loop import TrainingResult, first_state, fit
from sward.training.run_folder import RunFolder
from sward.training.step import StepOutput, TrainingStep
from sward.training.teacher import FrozenTeacher
from sward.training.teacher_cache import TeacherCache

__all__ = [
    "EpochSampler",
    "FrozenTeacher",
    "RunFolder",
    "StepOutput",
    "TeacherCache",
    "TrainingResult",
    "TrainingStep",
    "first_state",
    "fit",
    "keep_freed_memory",
]
