"""`sward completion bash`: a script that completes commands, presets, options and names, made from the configurations.

tyro's own scripts register the words `sward train PRESET` as three commands, so they complete nothing behind `sward`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

SHELLS = ("bash", "zsh")

_BASH = """\
_sward() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} words=""
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        words="@COMMANDS@"
    elif ((COMP_CWORD == 2)) && [[ $current != -* ]]; then
        case ${COMP_WORDS[1]} in
@FIRST@
        esac
    elif [[ $current == -* ]]; then
        case ${COMP_WORDS[1]} in
@OPTIONS@
        esac
    else
        case $previous in
@VALUES@
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _sward sward
"""


def script(shell: str, commands: Sequence[str]) -> str:
    """Return the script for a shell of `SHELLS`; zsh runs that of bash.

    Args:
        shell: where it will run.
        commands: names of all commands.
    """
    from sward import presets
    from sward.cli.own_data import SHORT
    from sward.reproduce.options import What

    kinds = _kinds()
    options = {command: [name for name, _ in _options(kind)] for command, kind in kinds.items()}
    for command in ("train", "train-teacher", "train-masks"):
        options[command] += [short for short, long in SHORT.items() if long in options[command]]
    first = {
        "train|train-teacher|train-masks|init": presets.names(),
        "list": ("models", "methods", "datasets", "presets"),
        "data": ("check", "pack"),
        "completion": SHELLS,
        "reproduce": typing.get_args(What),
        "layers": _names()["--model"],
    }
    values = {name: choices for kind in kinds.values() for name, choices in _options(kind) if choices}
    text = _BASH.replace("@COMMANDS@", " ".join(commands))
    text = text.replace("@FIRST@", _cases(first)).replace("@VALUES@", _cases({**values, **_names()}))
    text = text.replace("@OPTIONS@", _cases({command: [*each, "--help"] for command, each in options.items()}))
    return text if shell == "bash" else f"autoload -Uz bashcompinit && bashcompinit\n{text}"


def _cases(words: dict[str, Sequence[str]]) -> str:
    return "\n".join(f'        {pattern}) words="{" ".join(each)}" ;;' for pattern, each in words.items())


def _kinds() -> dict[str, Any]:
    from sward.cli.layers import Layers
    from sward.cli.options import DataPack, Demo, Evaluate, Export, Predict, Report
    from sward.config import DistillationConfig, MaskTrainingConfig, TeacherTrainingConfig
    from sward.reproduce.options import Options

    return {
        "train": DistillationConfig,
        "train-teacher": TeacherTrainingConfig,
        "train-masks": MaskTrainingConfig,
        "evaluate": Evaluate,
        "predict": Predict,
        "export": Export,
        "report": Report,
        "reproduce": Options,
        "layers": Layers,
        "demo": Demo,
        "data": DataPack,  # which has the options of data check too
    }


def _names() -> dict[str, Sequence[str]]:
    """Return the values of options whose type is only a string."""
    from sward import data, methods, models, presets

    # Up to the colon: what follows is a name of the library's.
    known = [*models.names(), "smp:", "timm:", "torchvision:", "transformers:"]
    return {
        "--model": known,
        "--teacher.name": known,
        "--distillation": ("none", *methods.METHODS),
        "--dataset.name": data.names(),
        "--preset": presets.names(),
        "--dataset": data.names(),
    }


def _options(kind: Any, prefix: str = "--") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the options of a configuration and their choices, with tyro's names."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if typing.get_origin(hint) is Annotated and field.name != "output":
            continue  # Positional.
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _options(hint, f"{name}.")
        else:
            yield name, _choices(hint)


def _choices(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is Literal:
        return tuple(str(each) for each in typing.get_args(hint))
    return tuple(choice for each in typing.get_args(hint) for choice in _choices(each))
