"""Students and teachers by name; see `names()`. Importing this package needs only torch."""

from sward.models.checkpoints import load_trunk_checkpoint, load_weights
from sward.models.flops import Complexity, complexity, complexity_table
from sward.models.registry import (
    ModelDescription,
    Stage,
    build,
    build_with_imagenet,
    check_name,
    describe,
    names,
    register,
)
from sward.models.sources import own_weights

__all__ = [
    "Complexity",
    "ModelDescription",
    "Stage",
    "build",
    "build_with_imagenet",
    "check_name",
    "complexity",
    "complexity_table",
    "describe",
    "load_trunk_checkpoint",
    "load_weights",
    "names",
    "own_weights",
    "register",
]
