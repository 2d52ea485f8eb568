"""The command line: `sward COMMAND ...`, the same as `python -m sward COMMAND ...`.

User errors print one line and exit with status 2. Failed runs (a full disk, a loss that is not finite) print one line
and exit with status 1. Ctrl-C and SIGTERM end a command with status 130 and 143; `train` and `train-teacher` save a
checkpoint first. To see the traceback of an error, run `python -X dev -m sward COMMAND ...`.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import tyro
except ModuleNotFoundError:
    sys.exit("sward: the command line needs the package tyro; install it with pip install 'sward[models]'")

from sward.cli import printing
from sward.cli.options import Complexity, DataPack, Demo, Doctor, Evaluate, Export, Predict, Report
from sward.cli.own_data import expand

COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {}
"""Command name -> function that runs it and its line in the list of commands; `_command` adds the entries."""

USER_ERROR = 2
RUN_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see the module docstring."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else USER_ERROR
    name, rest = words[0], words[1:]
    if name == "--version":
        from sward import __version__

        print(f"sward {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.4) or list(COMMANDS)
            raise ValueError(f"unknown command {name!r}; did you mean {' or '.join(near)}?")
        with printing.plain_warnings():
            COMMANDS[name][0](rest)
    except (ValueError, FileNotFoundError, IsADirectoryError, NotImplementedError, ModuleNotFoundError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"sward {name}{_process()}: {error}", file=sys.stderr)
        return USER_ERROR
    except (OSError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"sward {name}{_process()}: {_failure(error)}", file=sys.stderr)
        return RUN_FAILED
    except KeyboardInterrupt as stop:
        print(f"sward {name}{_process()}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    return 0


def _failure(error: Exception) -> str:
    """Say what failed, and for a full disk what to do about it."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    return (
        f"the disk of {error.filename or 'the output'} must have space left, got {error.strerror!r}; free some and run "
        "the command again, a training with --resume"
    )


def _process() -> str:
    rank = os.environ.get("RANK")
    return "" if rank is None else f" (process {rank})"


def _command(name: str, line: str) -> Callable[[Callable[[list[str]], None]], Callable[[list[str]], None]]:
    def register(function: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        COMMANDS[name] = (function, line)
        return function

    return register


def _overview() -> str:
    from sward import presets

    commands = "\n".join(f"  {name:<15}{line}" for name, (_, line) in COMMANDS.items())
    width = max(map(len, presets.names())) + 2
    listed = "\n".join(f"  {name:<{width}}{presets.get(name).description}" for name in presets.names())
    return (
        "usage: sward COMMAND ...\n\nDistil a transformer into a small segmentation network.\n\n"
        f"commands (sward COMMAND --help for the options):\n{commands}\n\npresets:\n{listed}\n\n"
        "sward --version prints the version."
    )


def _parse(kind: Any, command: str, words: list[str], default: Any = None) -> Any:
    options = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"sward {command}", args=words, **options)


def _preset(command: str, words: list[str]) -> tuple[str, list[str]]:
    """Split the name of the preset from the options after it."""
    from sward import presets

    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            return "demo", words
        raise ValueError(
            f"name a preset first, such as 'sward {command} {presets.names()[0]}'; 'sward --help' lists all presets"
        )
    if not (_is_file(words[0]) and command in ("train", "train-teacher")):
        presets.get(words[0])
    return words[0], ["--help" if word == "--help-all" else word for word in words[1:]]


def _is_file(word: str) -> bool:
    from sward.cli.starting import SUFFIXES

    return word.endswith(SUFFIXES)


@_command("demo", "see what distillation gains with few labels, on generated scenes, in minutes")
def _demo(words: list[str]) -> None:
    options = _parse(Demo, "demo", words)
    from sward.cli import demo

    print(demo.INTRODUCTION)
    result = demo.run(options.output, seeds=options.seeds, iterations=options.iterations, processes=options.processes)
    printing.print_demo(result)


@_command("train", "train a student, alone or with a teacher")
def _train(words: list[str]) -> None:
    from sward.cli.starting import warn_of_unread
    from sward.config import DistillationConfig

    words = expand(words)
    config = _configuration("train", DistillationConfig, lambda preset: preset.student, words)
    if config is None:
        return
    warn_of_unread(words, config.distillation)
    from sward.runs import train_student

    _finish(train_student(config), config.metric)


@_command("train-teacher", "train the teacher that a preset distils")
def _train_teacher(words: list[str]) -> None:
    from sward.config import TeacherTrainingConfig

    config = _configuration("train-teacher", TeacherTrainingConfig, lambda preset: preset.teacher, expand(words))
    if config is None:
        return
    from sward.runs import train_teacher

    _finish(train_teacher(config), config.metric)


def _finish(result: Any, metric: str) -> None:
    from sward import distributed
    from sward.reporting.card import write_card

    if distributed.is_main():
        write_card(result.run)
    printing.print_result(result, metric)


def _configuration(command: str, kind: Any, of_preset: Callable[[Any], Any], words: list[str]) -> Any:
    """Return the configuration of a training run, from a preset or a file and the words after it; None after help."""
    from sward import presets
    from sward.cli.starting import apply_words, read_config

    if {"-h", "--help"} & set(words):
        from sward.cli.help import short_help

        print(short_help(command))
        return None
    name, rest = _preset(command, words)
    default = read_config(kind, Path(name)) if _is_file(name) else of_preset(presets.get(name))
    return _parse(kind, f"{command} {name}", apply_words(default, rest), default)


@_command("train-masks", "learn MasKD's tokens or FreeKD's prompts on a trained teacher")
def _train_masks(words: list[str]) -> None:
    from sward import presets
    from sward.cli.starting import apply_words
    from sward.config import MaskTrainingConfig

    name, rest = _preset("train-masks", expand(words))
    default = presets.get(name).masks
    config = _parse(MaskTrainingConfig, f"train-masks {name}", apply_words(default, rest), default)
    from sward.runs import train_masks

    print(f"written: {train_masks(config)}")


@_command("data", "data check: look at your own folder; data pack: decode a data set once")
def _data(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        from sward import data

        print(
            "usage: sward data pack NAME [--root FOLDER] [--output FOLDER] ...\n"
            "       sward data check FOLDER\n\n"
            "  check  look at a folder of your own and print the commands to train on it\n"
            "  pack   decode every image and mask once into memory-mapped files (sward data pack --help)\n\n"
            f"data sets: {', '.join(name for name in data.names() if name != 'scenes')}"
        )
        return
    if words[0] == "check":
        from sward.cli.own_data import DataCheck, print_check

        print_check(_parse(DataCheck, "data check", words[1:]))
        return
    if words[0] != "pack":
        raise ValueError(f"unknown command 'data {words[0]}'; did you mean 'data pack' or 'data check'?")
    options = _parse(DataPack, "data pack", words[1:])
    from sward import data
    from sward.data.check import check_classes
    from sward.data.folder import FolderOptions
    from sward.data.packing import pack
    from sward.training.progress import Progress

    datasets = data.build_for_packing(
        options.name,
        root=options.root,
        split_by=options.split_by,
        num_classes=options.num_classes,
        image_range=options.image_range,
        folder_options=FolderOptions(
            options.classes, options.mask_values, options.ignore_values, options.images, options.masks
        ),
    )
    if options.name == "folder":
        check_classes(datasets, skip_corrupt=options.on_corrupt == "skip")
    frames = len({pair.image for dataset in datasets for pair in dataset.pairs})
    with Progress(f"pack {options.name}", frames) as progress:

        def advance() -> None:
            progress.advance()
            progress.note("")

        result = pack(datasets, options.output, on_corrupt=options.on_corrupt, workers=options.workers, advance=advance)
    left_out = f", {result.corrupt} skipped" if result.corrupt else ""
    print(f"{result.frames} frames, {result.bytes / 1e9:.2f} GB, {result.kept} of them reused{left_out}")
    print(f"pack: {result.folder}")


@_command("init", "print the configuration of a preset as YAML, for 'sward train CONFIG.yaml'")
def _init(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print("usage: sward init PRESET [--teacher] > CONFIG.yaml")
        return
    from sward import presets
    from sward.cli.starting import write_config

    preset = presets.get(words[0])
    if words[1:] not in ([], ["--teacher"]):
        raise ValueError(f"init must be followed by a preset and maybe --teacher, got {' '.join(words)}")
    print(write_config(preset.teacher if words[1:] else preset.student), end="")


@_command("list", "list models, methods, datasets or presets")
def _list(words: list[str]) -> None:
    from sward import data, methods, models, presets
    from sward.models.sources import FORMS

    listed = {
        "models": [*models.names(), *FORMS],
        "methods": ["none", *methods.METHODS],
        "datasets": data.names(),
        "presets": presets.names(),
    }
    if words in (["-h"], ["--help"]):
        print(f"usage: sward list {'|'.join(listed)}")
        return
    if len(words) != 1 or words[0] not in listed:
        raise ValueError(f"list must be followed by one of {', '.join(listed)}, got {' '.join(words) or 'nothing'}")
    print("\n".join(listed[words[0]]))


@_command("completion", "print a script that completes this command line in bash or zsh")
def _completion(words: list[str]) -> None:
    from sward.cli.completion import SHELLS, script

    if words in (["-h"], ["--help"]):
        print("usage: source <(sward completion bash)\n       source <(sward completion zsh)")
        return
    if len(words) != 1 or words[0] not in SHELLS:
        raise ValueError(f"completion must be followed by {' or '.join(SHELLS)}, got {' '.join(words) or 'nothing'}")
    print(script(words[0], list(COMMANDS)), end="")


@_command("layers", "list the layers of a network that can be distilled")
def _layers(words: list[str]) -> None:
    from sward.cli.layers import Layers, show

    show(_parse(Layers, "layers", words))


@_command("evaluate", "score a run on a split of its data set or of another one")
def _evaluate(words: list[str]) -> None:
    options = _parse(Evaluate, "evaluate", words)
    from sward.reporting.card import write_card
    from sward.runs import evaluate_run, evaluation_file
    from sward.runs.evaluate import is_writable
    from sward.training.run_folder import RunFolder

    scored: Any = {
        "split": options.split,
        "dataset": options.dataset,
        "root": options.root,
        "split_by": options.split_by,
        "checkpoint": options.checkpoint,
        "tile": options.tile,
        "overlap": options.overlap,
    }
    result = evaluate_run(options.run, **scored, batch=options.batch, device=options.device)
    dataset = options.dataset or RunFolder(options.run).read()[0].dataset.name
    printing.print_evaluation(result, f"{dataset}, {options.split} split, {result.images} images")
    if is_writable(options.run, warn=False):
        write_card(options.run)
        print(f"written: {evaluation_file(options.run, **scored)}")


@_command("predict", "write masks and overlays for image files")
def _predict(words: list[str]) -> None:
    options = _parse(Predict, "predict", words)
    if not options.images:
        raise ValueError("images must name at least one file after the run folder, got none")
    from sward.cli.predict import predict_images

    for path in predict_images(
        options.source,
        options.images,
        options.output,
        checkpoint=options.checkpoint,
        device=options.device,
        tile=options.tile,
        overlap=options.overlap,
        as_labels=options.as_labels,
        probabilities=options.probabilities,
        allow_large=options.allow_large,
        overwrite=options.overwrite,
    ):
        print(path)


@_command("export", "write a trained network as ONNX or .pt2, and prove it against PyTorch")
def _export(words: list[str]) -> None:
    options = _parse(Export, "export", words)
    from sward.deploy.proof import export_run
    from sward.reporting.card import write_export_card

    if options.fp16 and options.int8:
        raise ValueError("fp16 must be off with --int8, got both")
    exported = export_run(
        options.run,
        options.output,
        checkpoint=options.checkpoint,
        input=options.input,
        output=options.returns,
        size=options.size,
        check=options.check,
        split=options.split,
        root=options.root,
        tolerance=options.tolerance,
        precision="int8" if options.int8 else "fp16" if options.fp16 else "fp32",
        calibrate=options.calibrate,
        force=options.force,
        overwrite=options.overwrite,
    )
    write_export_card(exported)
    printing.print_export(exported)


@_command("reproduce", "run the experiments of a table or figure of the paper and create it")
def _reproduce(words: list[str]) -> None:
    from sward.reproduce import Options, reproduce

    for path in reproduce(_parse(Options, "reproduce", words)):
        print(f"written: {path}")


@_command("report", "write one HTML page about one or more runs")
def _report(words: list[str]) -> None:
    options = _parse(Report, "report", words)
    from sward.reporting.page import write_report

    print(f"written: {write_report(options.runs, options.output, root=options.root)}")


@_command("complexity", "parameters and FLOPs of every teacher and student, and the paper's values")
def _complexity(words: list[str]) -> None:
    options = _parse(Complexity, "complexity", words)
    from sward.models.flops import complexity_table, render

    printing.console().print(render(complexity_table(options.models or None)))


@_command("doctor", "versions, devices, and which implementation each operation will use")
def _doctor(words: list[str]) -> None:
    _parse(Doctor, "doctor", words)
    from sward.cli.doctor import describe_machine

    print(describe_machine())
