"""Masks and overlays for images outside any data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sward.data import EvaluationTransform
from sward.data.files import read_image
from sward.evaluation import predicted_labels
from sward.figures.predictions import overlay
from sward.runs import load_run
from sward.runs.load import choose_device
from sward.training.run_folder import make_folder


@torch.no_grad()
def predict_images(
    run: Path,
    images: Sequence[Path],
    output: Path | None = None,
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: str | None = None,
) -> Iterator[Path]:
    """Writes `NAME-mask.png` and `NAME-overlay.png` for every image and yields their paths.

    The mask is a palette PNG: its pixel values are class indices, and viewers show the data set's colours.

    Args:
        run: run folder.
        images: files that Pillow reads, of any size; predictions come out at that size.
        output: folder to write into, made if absent. Default: `predictions` in the run folder.
        checkpoint: which weights of the run.
        device: where to run; None takes the GPU where there is one.

    Raises:
        FileNotFoundError: if the run or an image is not there, before anything is written.
        ValueError: if the folder cannot be written, before any work, or an image cannot be read.
    """
    from PIL import Image

    config, info, network = load_run(run, checkpoint)
    missing = [path for path in images if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"there is no image at {missing[0]}")
    target = choose_device(device)
    network.to(target)
    folder = output or run / "predictions"
    make_folder(folder)
    transform = EvaluationTransform(config.dataset.image_size)
    for path in images:
        image = read_image(path)
        size = (image.shape[-2], image.shape[-1])
        normalised, _ = transform(image, torch.zeros(size, dtype=torch.uint8))
        labels = predicted_labels(network(normalised[None].to(target)), size)[0].cpu()
        mask = Image.fromarray(labels.numpy().astype(np.uint8), mode="P")
        mask.putpalette([channel for colour in info.palette for channel in colour])
        mask.save(folder / f"{path.stem}-mask.png")
        yield folder / f"{path.stem}-mask.png"
        Image.fromarray(overlay(image, labels, info)).save(folder / f"{path.stem}-overlay.png")
        yield folder / f"{path.stem}-overlay.png"
