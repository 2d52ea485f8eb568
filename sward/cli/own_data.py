"""What the command line offers for a folder of one's own: short options, and `sward data check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

SHORT = {
    "--data": "--dataset.root",
    "--classes": "--dataset.classes",
    "--mask-values": "--dataset.mask-values",
    "--ignore-values": "--dataset.ignore-values",
    "--images": "--dataset.images",
    "--masks": "--dataset.masks",
    "--split": "--dataset.split-by",
    "--labelled-share": "--dataset.labelled-share",
    "--split-seed": "--dataset.split-seed",
    "--group-by": "--dataset.group-by",
    "--student-layers": "--sward.student-layers",
    "--teacher-layers": "--sward.teacher-layers",
    # Spelled as --teacher.options and --teacher.weights are.
    "--model.options": "--model-options",
    "--model.weights": "--model-weights",
}
"""Short option -> the option that it stands for."""
LISTS = ("--classes", "--mask-values", "--ignore-values", "--class-weights")
"""Options that take a list separated by commas."""


@dataclass
class DataCheck:
    """Look at a folder of images and masks and print what it holds, with the commands to train on it."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The folder, or a CSV file with the columns image and mask."""
    images: str | None = None
    """Pattern of the folder of images, such as frames/{split}."""
    masks: str | None = None
    """Pattern of a mask, such as masks/{split}/{name}_mask.png."""


def expand(words: Sequence[str]) -> list[str]:
    """Replace the short options by those of the configuration, and split their lists at commas."""
    expanded: list[str] = []
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            option = name
            expanded.append(SHORT.get(name, name) + (equals + value if name not in LISTS else ""))
            word = value if equals and name in LISTS else ""
        if word:
            expanded += [part for part in word.split(",") if part] if option in LISTS else [word]
    return expanded


def print_check(options: DataCheck) -> None:
    """Print what `sward.data.survey` finds.

    Raises:
        ValueError: something stands in the way of a training; all of it is printed first.
    """
    from sward.data.files import shortened
    from sward.data.survey import exact_text, survey

    found = survey(options.folder, images=options.images, masks=options.masks)
    total = max(sum(found.values.values()), 1)
    sizes = [f"{width} x {height} ({count})" for (height, width), count in found.sizes.most_common()]
    values = [f"{value} ({count / total:.1%})" for value, count in found.values.most_common()]
    print(f"layout:      {found.layout}")
    print(f"images:      {', '.join(f'{count} {split}' for split, count in found.frames.items())}")
    print(f"sizes:       {shortened(sizes)}")
    print(f"mask values: {shortened(values, 8)}")
    if found.lossy:
        print(f"lossy masks: {found.lossy}; a pixel takes the nearest class")
    if found.between_black_and_white:
        meaning = (
            "128 and above count as foreground"
            if found.is_soft_black_and_white
            else f"if they are soft edges and not classes, train with: {found.soft_command}"
        )
        share = max(found.between_black_and_white, 0.0001)
        print(f"grey:        {share:.2%} of the pixels lie between 0 and 255; {meaning}")
    if found.turned:
        print(f"turned:      {found.turned} images have an EXIF orientation, which is applied, as that of a mask is")
    if found.turned_alone:
        print(
            f"turned:      {found.turned_alone} of them have a mask without one; check in an image viewer that both "
            "are the same way up"
        )
    if found.wide:
        span = f"up to {exact_text(found.highest)}" + (f", down to {exact_text(found.lowest)}" if found.lowest else "")
        print(f"wide:        {sum(found.wide.values())} images have more than 8 bits, {span}")
    if found.one_bit:
        print(f"1-bit masks: {found.one_bit} beside masks of 0 and 255; their white counts as 255")
    if found.duplicates:
        named = [f"{one} = {other}" for one, other in found.duplicates]
        cure = "remove one of each" if found.has_splits else "keep them in one split with --group-by"
        print(f"duplicates:  {shortened(named)} have the same bytes; {cure}")
    for problem in found.problems[:10]:
        print(f"problem:     {problem}")
    if found.problems:
        raise ValueError(f"{options.folder} must be free of problems, got {len(found.problems)}")
    print(f"teacher:     {found.teacher_command}")
    print(f"train with:  {found.command}")
