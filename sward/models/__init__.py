"""Students and teachers by name; see `names()`. Importing this needs torch alone."""

from sward.models.registry import ModelDescription, Stage, build, describe, names

__all__ = ["ModelDescription", "Stage", "build", "describe", "names"]
