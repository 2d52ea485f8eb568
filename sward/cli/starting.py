"""Where a run's configuration starts: a preset or a file, and what the words of the command change in it first."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from sward import data
from sward.config import DatasetConfig, DistillationConfig, MaskTrainingConfig, SWARDConfig, TeacherTrainingConfig
from sward.config_json import from_json, to_json
from sward.losses.recipes import RECIPES

Config = TypeVar("Config", DistillationConfig, TeacherTrainingConfig)

TEACHER_SOURCES = {"--teacher.run", "--teacher.weights", "--teacher.untrained"}

KEPT_FOR_ANOTHER_DATA_SET = ("image_size", "workers", "views", "labelled_share", "split_seed")
"""Fields of `DatasetConfig` that say nothing about the images of one data set."""

SUFFIXES = (".yaml", ".yml", ".json")


def value_of(option: str, words: list[str]) -> str | None:
    """Return the last value that `words` give an option, as `--option value` or `--option=value`."""
    found = None
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            found = words[index + 1]
        elif word.startswith(f"{option}="):
            found = word.removeprefix(f"{option}=")
    return found


def read_config(kind: type[Config], path: Path) -> Config:
    """Read a configuration from a YAML or JSON file; fields that it does not name keep their defaults.

    A `recipe` sets the fields of `sward` that it defines and that the file does not name.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is not a mapping of the fields of `kind`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration at {path.absolute()}; 'sward init PRESET' prints one")
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML.
        if not isinstance(values, dict):
            raise ValueError(f"got {type(values).__name__}")
        recipe, settings = values.get("recipe"), values.get("sward", {})
        if recipe in RECIPES and isinstance(settings, dict):
            values["sward"] = {**RECIPES[recipe]._asdict(), **settings}
        config = from_json(kind, json.dumps(values))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must hold the fields of {kind.__name__}: {error}") from error
    return config


def write_config(config: Any) -> str:
    """Return a configuration as YAML text that `read_config` reads.

    Fields of `sward` that are as the `recipe` sets them are left out, so that an edited recipe changes them.
    """
    import yaml

    values = json.loads(to_json(config))
    if isinstance(config, DistillationConfig):
        for name, value in RECIPES[config.recipe]._asdict().items():
            if getattr(config.sward, name) == value:
                del values["sward"][name]
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)


def apply_words(config: DistillationConfig | TeacherTrainingConfig | MaskTrainingConfig, words: list[str]) -> list[str]:
    """Clear what the words of a command contradict in `config`, take their `KEY=VALUE` options, and return the rest.

    `--recipe` sets its fields, which other options then change. `--iterations` clears `epochs` and the reverse, and a
    source of the teacher clears the others. Another model, teacher or data set clears the options, layers, windows,
    split and metric that belong to the one before, and a student alone the images without labels.
    """
    if isinstance(config, DistillationConfig):
        for recipe in RECIPES:
            if value_of("--recipe", words) == recipe:
                config.use_recipe(recipe)
        if {word.partition("=")[0] for word in words} & {"--sward.student-layers", "--sward.teacher-layers"}:
            _forget_stages(config.sward)
    left = _take_options("--teacher.options", words, config.teacher) if hasattr(config, "teacher") else words
    if not isinstance(config, MaskTrainingConfig):
        if value_of("--iterations", words) is not None and value_of("--epochs", words) is None:
            config.epochs = None
        if value_of("--epochs", words) is not None and value_of("--iterations", words) is None:
            config.iterations = None
        model = value_of("--model", words)
        if model is not None and model != config.model:
            config.model_options, config.model_weights = {}, None
            if isinstance(config, DistillationConfig):
                config.sward.pdr_layer = None
                _forget_stages(config.sward)
        left = _take_options("--model-options", left, config, "model_options")
    if not isinstance(config, TeacherTrainingConfig):
        teacher = value_of("--teacher.name", words)
        is_another = teacher not in (None, config.teacher.name)
        if is_another or {word.partition("=")[0] for word in words} & TEACHER_SOURCES:
            config.teacher.run, config.teacher.weights, config.teacher.untrained = None, None, False
        if is_another:
            if isinstance(config, DistillationConfig):
                _forget_stages(config.sward)
            if value_of("--teacher.options", words) is None:
                config.teacher.options = {}
            _check_teacher(str(teacher), words)
    dataset = value_of("--dataset.name", words)
    if dataset is not None and dataset != config.dataset.name:
        kept = {name: getattr(config.dataset, name) for name in KEPT_FOR_ANOTHER_DATA_SET}
        config.dataset = DatasetConfig(config.dataset.name, **kept)
        if not isinstance(config, MaskTrainingConfig) and config.metric == "dice" and dataset in data.names():
            # Of two classes alone; a folder says how many it has with other options.
            config.metric = "dice" if dataset == "folder" or data.describe(dataset).num_classes == 2 else "mean_iou"
    if isinstance(config, DistillationConfig) and value_of("--distillation", words) == "none":
        config.unlabelled, config.unlabelled_batch, config.pseudo_labels = (), None, None
    return left


def _forget_stages(settings: SWARDConfig) -> None:
    """Let the stages of another pair be chosen; windows per stage belong to the stages of the pair before."""
    settings.student_layers = settings.teacher_layers = ()
    if len(settings.window_size) > 1:
        settings.window_size = SWARDConfig().window_size


def _check_teacher(name: str, words: list[str]) -> None:
    """Raise a ValueError if a teacher is named but another one would be loaded."""
    if value_of("--teacher.run", words) is not None:
        raise ValueError(f"teacher.name must be left out with --teacher.run, got {name!r}; the run names its network")
    given = value_of("--teacher.weights", words) is not None or "--teacher.untrained" in words
    if not given and not name.startswith("transformers:"):
        raise ValueError(
            f"teacher.weights must be a file for the teacher {name!r}, got None; or try it with --teacher.untrained, "
            "or train it with 'sward train-teacher --model' and leave out --teacher.name"
        )


def _take_options(option: str, words: list[str], holder: Any, field: str = "options") -> list[str]:
    """Put the `KEY=VALUE` words behind `option` into a field of `holder`, and return the other words."""
    if option not in words:
        return words
    start = words.index(option) + 1
    end = next((index for index in range(start, len(words)) if words[index].startswith("--")), len(words))
    pairs = dict(getattr(holder, field))
    for word in words[start:end]:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} must be followed by KEY=VALUE, got {word!r}")
        pairs[key] = int(value) if value.removeprefix("-").isdigit() else value
    setattr(holder, field, pairs)
    return words[: start - 1] + words[end:]


def warn_of_unread(words: Sequence[str], distillation: str) -> None:
    """Warn of options of sward beside another method. A student alone takes the words of its distilled sibling."""
    if distillation in ("sward", "none"):
        return
    names = [word.partition("=")[0] for word in words]
    unread = [name for name in names if name.startswith("--sward.") or name == "--recipe"]
    if unread:
        warnings.warn(f"{', '.join(unread)} without effect: only 'sward' reads it, not {distillation!r}", stacklevel=2)
