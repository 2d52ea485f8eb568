"""The short help of `sward train` and `sward train-teacher`: the options that most runs need."""

from __future__ import annotations

from sward import data, methods, models, presets
from sward.models.sources import FORMS

_SHARED = {
    "--model NAME": "the network, see below",
    "--model-options KEY=VALUE ...": "options of its builder",
    "--model-weights FILE|imagenet|none": "its initial weights, see below",
    "--data FOLDER": "your images and masks, for the preset own",
    "--classes A,B,... --mask-values 0,255": "names of its classes and their values in its masks",
    "--split 80/10/10": "shares of train, val and test, if it has none",
    "--dataset.name NAME": "or a data set by name, see below,",
    "--dataset.root FOLDER": "which lies here",
    "--dataset.image-size H W": "pixels of the training images",
    "--dataset.workers N": "loader processes",
    "--batch N": "images per step, over all processes",
    "--iterations N | --epochs N": "length; one clears the other",
    "--metric mean_iou|mean_dice|dice": "validation score that chooses the best weights",
    "--optimizer.lr X": "initial learning rate",
    "--precision fp32|bf16|fp16": "of the forward pass",
    "--compile": "use torch.compile",
    "--seed N": "seed of everything",
    "--output FOLDER [--resume]": "run folder; resume the run in it",
    "--device NAME": "such as cpu or cuda",
}
_STUDENT = {
    "--distillation METHOD": "the method, see below, or none",
    "--recipe recommended|paper": "settings of sward",
    "--teacher.run FOLDER": "run of train-teacher",
    "--teacher.name NAME": "or a teacher by name,",
    "--teacher.weights FILE | .untrained": "with these weights, or with random ones",
    "--student-layers LAYER ...": "of sward; see 'sward layers MODEL'",
    "--teacher-layers LAYER ...": "one per student layer",
    "--teacher.taps.format nchw|nhwc|tokens": "order of its maps, where not found; also --student-taps",
    "--unlabelled FOLDER ...": "images without masks, to distil on too",
}
_TEACHER = {
    "--trunk-checkpoint FILE": "weights of the trunk alone, see below",
    "--train-trunk": "train the trunk too",
}

_FILES = {
    "FILE": "the whole network, from torch.save or as safetensors; at the top level or under model, state_dict or\n"
    "  model_state_dict; with or without a prefix such as module.",
    "imagenet": "the encoder, for smp:, torchvision: and timm:, from the library's cache or hub",
    "none": "random; 'random' does so in a frozen trunk too",
}


def short_help(command: str) -> str:
    """Return the help of `sward COMMAND --help`."""
    options = {**_SHARED, **(_STUDENT if command == "train" else _TEACHER)}
    lines = [f"usage: sward {command} PRESET|CONFIG.yaml [options]", ""]
    lines += [f"  {option:<40}{text}" for option, text in options.items()]
    listed = {
        "presets": presets.names(),
        "models": [*models.names("student" if command == "train" else "teacher"), *FORMS],
        "methods": ["none", *methods.METHODS],
        "data sets": data.names(),
    }
    if command != "train":
        del listed["methods"]
    lines.append("")
    lines += [f"{kind}: {', '.join(names)}" for kind, names in listed.items()]
    lines += ["", "weights:", *(f"  {name}: {text}" for name, text in _FILES.items())]
    lines.append("  transformers:FOLDER brings those of the folder")
    if command != "train":
        lines.append("  --trunk-checkpoint: SAM 2.1, MedSAM2, DINOv2, or timm's names for hiera and timm: networks")
    return "\n".join([*lines, "", f"All options with the values of a preset: sward {command} PRESET --help-all"])
