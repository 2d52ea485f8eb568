"""Options of the commands, one dataclass per command; the strings under the fields are the help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Demo:
    """Show what distillation gains where few images have labels: a transformer trained on generated scenes without end,
    a small network trained on 24 of them, alone and with SWARD, over several seeds."""

    output: Path = Path("runs/demo")
    """Folder of the runs, the pictures and the exported file; replaces an earlier demo."""
    seeds: int = 4
    """Number of students of each kind."""
    iterations: int | None = None
    """Steps of each run; set a small number for a quick look."""
    processes: int = 2
    """Runs at a time, each with one thread; the scores do not depend on it."""


@dataclass
class Evaluate:
    """Score the network of a run at the resolution of the labels and write the scores into the run folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    split: str = "val"
    """Split of the data set, or all for every image."""
    dataset: str | None = None
    """Another data set with the same classes; that of the run by default."""
    root: Path | None = None
    """Folder that holds the data set; that of the run by default."""
    split_by: str | None = None
    """How the data is split: sequence, ratio or parity (ColonDB) for polyps, shares such as 80/10/10 for a folder, or a
    list file; as in the run by default."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights to use."""
    batch: int = 8
    """Images per forward pass; always one with tiles."""
    device: str | None = None
    """Device to run on; the GPU if there is one."""
    tile: tuple[int, int] | None = None
    """Height and width of tiles at the images' own resolution; by default images are resized as in the run."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share; a quarter of the tile by default."""


@dataclass
class Predict:
    """Write NAME-mask.png (class indices, in colour) and NAME-overlay.png for each image, at the image's size."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run folder, checkpoint or exported file."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, folders of images, or patterns such as 'a/**/*.jpg'."""
    output: Path | None = None
    """Where to write; a folder named predictions in the run folder or beside the file by default."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights of a run folder."""
    device: str | None = None
    """Where to run; the GPU where there is one."""
    tile: tuple[int, int] | None = None
    """Height and width of tiles at the image's own resolution; by default the image is resized for the network."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share; a quarter of the tile by default."""
    as_labels: tuple[int, ...] | None = None
    """Write grey masks with these values by class; without values 0 and 255 for two classes, else class indices."""
    probabilities: Literal["npy", "png"] | None = None
    """Also write probabilities: NAME-probabilities.npy, or one 16-bit PNG per class."""
    allow_large: bool = False
    """Read images that Pillow takes for decompression bombs."""
    overwrite: bool = False
    """Replace existing files."""


@dataclass
class Export:
    """Write a trained network as ONNX or torch.export file, and prove that it predicts what PyTorch predicts.

    The file takes RGB images of any size: normalisation, padding and cropping are part of it.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or a checkpoint in it."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """File to write; .onnx or .pt2."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights of a run folder."""
    input: Literal["uint8", "float", "normalised"] = "uint8"
    """What the images hold: RGB of 0 to 255, RGB of 0 to 1, or floats that are already normalised."""
    returns: Literal["logits", "probabilities", "argmax"] = "logits"
    """What the file returns."""
    size: tuple[int, int] | None = None
    """Height and width to limit the file to; free by default."""
    check: int | None = None
    """Images to prove it on; the whole split by default, 0 skips the proof."""
    split: str = "val"
    """Split of the run's data set to prove it on."""
    root: Path | None = None
    """Folder that holds the data set; the run's own by default."""
    tolerance: float | None = None
    """Largest accepted difference in mIoU and Dice, as a fraction; 1e-4 by default, 1e-3 for fp16, 1e-2 for int8."""
    fp16: bool = False
    """Write an ONNX file in half precision."""
    int8: bool = False
    """Write an ONNX file quantised to int8 per channel, calibrated on training images."""
    calibrate: int = 64
    """Training images that set the ranges of int8."""
    force: bool = False
    """Keep a file that fails the proof, with every layer of an int8 file in int8."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass
class Report:
    """Write one HTML page about one or more runs, for people who decide: what the student keeps, costs and gets wrong.

    The teacher and the student alone are added where they lie beside the runs. The images are embedded, so the page
    works offline.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    output: Path | None = None
    """Path of the page; report.html in the first run folder by default."""
    root: Path | None = None
    """Folder that holds the data sets; that of each run by default."""


@dataclass
class Complexity:
    """Count parameters and FLOPs at 3x512x512 and print them next to the paper's values."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of networks; all by default."""


@dataclass
class DataPack:
    """Decode every image and mask of a data set once, into files that training maps into memory.

    The pack is written to sward-pack in the data set's folder, where every run finds it, or to --output; then pass it
    as --dataset.packed. The command can be interrupted at any time; run again, it verifies all checksums and packs what
    is missing or has changed.
    """

    name: Annotated[str, tyro.conf.Positional]
    """Data set: cityscapes, cvc_clinicdb, cvc_colondb, camvid or folder; or unlabelled, for a folder of images."""
    root: Path | None = None
    """Folder that holds the data set; None looks in $SWARD_DATA, then in ./data."""
    output: Path | None = None
    """Folder of the pack, if the data set is read-only or another disk is faster."""
    split_by: str | None = None
    """For polyps: path of a list of the frames to pack; all by default."""
    num_classes: int | None = None
    """For a folder of images and masks: number of classes in its masks."""
    classes: tuple[str, ...] = ()
    """For a folder: names of its classes."""
    mask_values: tuple[str, ...] = ()
    """For a folder: value of each class in the masks, or range such as 128-255."""
    ignore_values: tuple[str, ...] = ()
    """For a folder: values of pixels to ignore."""
    images: str | None = None
    """For a folder: pattern of its image folder, such as frames/{split}."""
    masks: str | None = None
    """For a folder: pattern of a mask, such as masks/{split}/{name}_mask.png."""
    image_range: tuple[float, float] | None = None
    """Values that become black and white in images with more than 8 bits per channel."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """What to do if an image or mask cannot be read: stop, or skip it with a warning."""
    workers: int | None = None
    """Decoder threads; by default one per core, at most 8."""


@dataclass
class Doctor:
    """Print versions, devices and the implementation that each operation will use."""
