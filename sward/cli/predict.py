"""`sward predict`: masks and overlays for image files outside of a data set."""

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
    """Write `NAME-mask.png` and `NAME-overlay.png` for every image and yield their paths.

    The mask is a palette PNG: its pixel values are class indices, and viewers show the data set's colours.

    Args:
        run: run folder.
        images: image files that Pillow can read; predictions have the size of the image.
        output: folder to write to, created if necessary. Default: `predictions` in the run folder.
        checkpoint: which weights of the run to use.
        device: device to run on; None uses the GPU if there is one.

    Raises:
        FileNotFoundError: if the run or an image does not exist; nothing is written then.
        ValueError: if the folder is not writable (checked first) or an image cannot be read.
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
