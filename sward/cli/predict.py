"""`sward predict`: masks and overlays for image files outside of a data set."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sward import atomic
from sward.deploy.images import find_images, output_names, pixel_limit
from sward.deploy.predictor import Checkpoint, Predictor, load
from sward.figures.predictions import overlay
from sward.training.progress import Progress
from sward.training.run_folder import make_folder

Probabilities = Literal["npy", "png"]
"""`"npy"`: float32 `[K, H, W]`; `"png"`: one 16-bit grey PNG per class, 65535 for a probability of 1."""


def predict_images(
    source: Path,
    paths: Sequence[Path],
    output: Path | None = None,
    *,
    checkpoint: Checkpoint = "best",
    device: str | None = None,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
    as_labels: tuple[int, ...] | None = None,
    probabilities: Probabilities | None = None,
    allow_large: bool = False,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Write `NAME-mask.png` and `NAME-overlay.png` per image and yield their paths.

    The mask is a palette PNG: its pixel values are class indices, and viewers show the data set's colours.

    Args:
        source: run folder, checkpoint or exported file.
        paths: files that Pillow reads, of any size; folders; glob patterns. Predictions have the size of the image.
        output: folder to write into, created if absent. Default: `predictions` in the run folder or beside the file.
        checkpoint: which weights of a run folder.
        device: where to run; None uses the GPU if there is one.
        tile: predict in tiles of this height and width at the image's own resolution; None resizes the image to the
            size at which the network was evaluated.
        overlap: pixels that neighbouring tiles share; None takes a quarter of the tile.
        as_labels: write grey masks with these values by class; empty takes 0 and 255 for two classes, else indices.
        probabilities: also write the probability of every class, in this form.
        allow_large: read images that Pillow takes for decompression bombs.
        overwrite: replace existing files.

    Raises:
        FileNotFoundError: if the source or an image does not exist, before anything is written.
        ValueError: if an argument is wrong, a file exists or the folder is not writable, before any work; or, after
            the others are written, if images cannot be read.
    """
    predictor = load(source, checkpoint=checkpoint, device=device)
    predictor.check_tile(tile, overlap)
    values = None if as_labels is None else _label_values(as_labels, len(predictor.classes))
    if probabilities is not None:
        predictor.check_probabilities()
    folder = output or (source if source.is_dir() else source.parent) / "predictions"
    images, others = find_images(paths, leave_out=folder)
    if others:
        print(f"left out, as they are not images: {others}", file=sys.stderr)
    targets = [folder / name for name in output_names(images)]
    _check_free(images, [_files(name, predictor, probabilities) for name in targets], overwrite)
    make_folder(folder)
    with pixel_limit(images, allow_large=allow_large), Progress("predict", len(images)) as progress:
        unreadable = []
        for path, name in zip(images, targets):
            try:
                image = predictor.read(path)
            except (ValueError, FileNotFoundError) as error:
                unreadable.append(path)
                if len(images) == 1:
                    raise
                print(error, file=sys.stderr)
            else:
                name.parent.mkdir(parents=True, exist_ok=True)
                yield from _predict(predictor, image, name, tile, overlap, values, probabilities)
            progress.advance()
    if unreadable:
        raise ValueError(
            f"every image must be readable, got {len(unreadable)} of {len(images)} that are not, such as "
            f"{unreadable[0]}; the others are predicted"
        )


def _predict(
    predictor: Predictor,
    image: Tensor,
    name: Path,
    tile: tuple[int, int] | None,
    overlap: int | None,
    values: tuple[int, ...] | None,
    probabilities: Probabilities | None,
) -> Iterator[Path]:
    from PIL import Image

    size = (image.shape[-2], image.shape[-1])
    labels = np.empty(size, np.uint8)
    shown = np.empty((*size, 3), np.uint8)
    chances = np.empty((len(predictor.classes), *size), np.float32 if probabilities == "npy" else np.uint16)
    for top, outputs in predictor.bands(image, tile, overlap):
        found = predictor.to_labels(outputs)
        rows = slice(top, top + len(found))
        labels[rows] = found.to(torch.uint8).numpy()
        shown[rows] = overlay(image[:, rows], found, predictor.info)
        if probabilities is not None:
            chances[:, rows] = _stored(predictor.to_probabilities(outputs), probabilities)
    files = _files(name, predictor, probabilities)
    if values is None:
        mask = Image.fromarray(labels, mode="P")
        mask.putpalette([channel for colour in predictor.info.palette for channel in colour])
    else:
        mask = Image.fromarray(np.array(values, np.uint8)[labels])
    pictures = [mask, Image.fromarray(shown)]
    if probabilities == "png":
        pictures += [Image.fromarray(each) for each in chances]
    for file, picture in zip(files, pictures):
        with atomic.replacing(file, durable=False) as stream:
            picture.save(stream, format="PNG")
        yield file
    if probabilities == "npy":
        with atomic.replacing(files[-1], durable=False) as stream:
            np.save(stream, chances)
        yield files[-1]


def _stored(chances: Tensor, form: Probabilities) -> Any:
    return chances.numpy() if form == "npy" else (chances * 65535).round().numpy().astype(np.uint16)


def _files(name: Path, predictor: Predictor, probabilities: Probabilities | None) -> list[Path]:
    ends = ["mask.png", "overlay.png"]
    if probabilities == "npy":
        ends.append("probabilities.npy")
    if probabilities == "png":
        ends += [f"probability-{index}.png" for index in range(len(predictor.classes))]
    return [name.with_name(f"{name.name}-{end}") for end in ends]


def _check_free(images: Sequence[Path], files: Sequence[Sequence[Path]], overwrite: bool) -> None:
    read = {image.resolve() for image in images}
    written: set[Path] = set()
    for each in (file for group in files for file in group):
        if each.resolve() in read:
            raise ValueError(f"output must not hold the images themselves, got {each}; choose another --output")
        if each in written:
            raise ValueError(f"images must have names that differ in more than their endings, got two for {each}")
        written.add(each)
        if each.exists() and not overwrite:
            raise ValueError(f"{each} must not exist yet; use --overwrite or another --output")


def _label_values(values: tuple[int, ...], classes: int) -> tuple[int, ...]:
    if not values:
        return (0, 255) if classes == 2 else tuple(range(classes))
    if len(values) != classes or len(set(values)) < classes or not all(0 <= value <= 255 for value in values):
        given = " ".join(map(str, values))
        raise ValueError(f"as_labels must be {classes} different values from 0 to 255, one per class, got {given}")
    return values
