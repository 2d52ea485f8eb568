"""Configurations as JSON: written, read back with checked types, and compared."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from sward.config import TeacherTrainingConfig
from sward.data.shards import is_shards

UNCOMPARED = {
    "resume",
    "log_every",
    "checkpoint_every",
    "tensorboard",
    "device",
    "output",
    "on_corrupt",
    "dataset.root",
    "dataset.workers",
    "dataset.packed",
    "teacher.run",
    "teacher.masks",
    "teacher.cache",
    "cache",
}
"""Fields that do not change what a run computes; on resuming they may differ from those of the stored run."""

Config = TypeVar("Config")


def to_json(config: Any) -> str:
    """Serialise a dataclass to JSON text, with paths as strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str)


def from_json(kind: type[Config], text: str) -> Config:
    """Deserialise a dataclass of type `kind` from the output of `to_json`.

    Raises:
        ValueError: if the text is not a JSON object, or a field does not exist, is missing or has a value of another
            type.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it must be JSON, got an error: {error}") from error
    if kind is TeacherTrainingConfig and isinstance(values, dict) and "options" in values:
        values["model_options"] = values.pop("options")  # The name in configurations of early versions.
    return _build(kind, values)


def _build(kind: Any, value: Any, name: str = "") -> Any:
    """Return `value`, as read from JSON, as the type `kind` of the field `name`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        problems = []
        for choice in (each for each in arguments if each is not type(None)):
            try:
                return _build(choice, value, name)
            except ValueError as error:
                problems.append(error)
        raise problems[0]
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) == len(kinds):
            # YAML reads the 255 of mask_values: [0, 255] as a number.
            items = [
                str(item) if each is str and type(item) in (int, float) else item for each, item in zip(kinds, value)
            ]
            return tuple(_build(each, item, name) for each, item in zip(kinds, items))
        raise ValueError(f"{name} must be {len(kinds)} values, got {len(value)}")
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(
                f"{kind.__name__} has no field {sorted(map(str, unknown))[0]!r}; it was written by another version of "
                "sward"
            )
        prefix = f"{name}." if name else ""
        for each in dataclasses.fields(kind):
            if each.name not in value and each.default is each.default_factory is dataclasses.MISSING:
                raise ValueError(f"{prefix}{each.name} must be given, got nothing")
        return kind(**{key: _build(hints[key], item, f"{prefix}{key}") for key, item in value.items()})
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string.
        except ValueError:
            pass
    if kind is Path and isinstance(value, str):
        return Path(value)
    if (kind in (int, str, bool) and type(value) is kind) or (dict in (kind, origin) and isinstance(value, dict)):
        return value
    raise ValueError(f"{name or kind.__name__} must be {_expected(kind, origin, arguments)}, got {value!r}")


def _expected(kind: Any, origin: Any, arguments: tuple[Any, ...]) -> str:
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return "a list of values"
    if dict in (kind, origin) or dataclasses.is_dataclass(kind):
        return "a mapping of names to values"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}[kind]


def differences(stored: Any, wanted: Any) -> list[str]:
    """Describe the differences between two configurations that change results, one phrase per field."""
    return _differences(json.loads(to_json(stored)), json.loads(to_json(wanted)))


def _names(sources: str | list[str]) -> list[str]:
    """Return a path, or each of several, without its folder; addresses and commands, which have no checksum, whole."""
    return [
        each if is_shards(each) else Path(each).name for each in ([sources] if isinstance(sources, str) else sources)
    ]


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*stored, *wanted}):
        old, new = stored.get(name), wanted.get(name)
        if prefix + name in UNCOMPARED:
            continue
        if name in ("student_layers", "teacher_layers") and not (old and new):
            # Empty means chosen when the run starts; a run that starts compares the chosen ones.
            continue
        if name == "unlabelled_batch" and new is None:
            # None means chosen when the run starts, and stored then.
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif name in ("trunk_checkpoint", "unlabelled") and old and new:
            # Files that were moved are the same: the checkpoint has their checksums.
            if _names(old) != _names(new):
                found.append(f"{prefix}{name} is {old}, not {new}")
        elif old != new:
            found.append(f"{prefix}{name} is {old}, not {new}")
    return found
