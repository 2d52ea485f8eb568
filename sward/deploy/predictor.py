"""Predict with a run, a checkpoint or an exported file, on images of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sward.alignment import resize
from sward.data import DatasetInfo, read_image
from sward.data.images import read_opened
from sward.data.transforms import resize_image
from sward.deploy.metadata import Metadata
from sward.deploy.network import DeployedNetwork
from sward.deploy.tiles import blended_bands, check_tile, default_overlap
from sward.evaluation import predicted_labels
from sward.runs.load import choose_device, load_run
from sward.training.run_folder import RunFolder

Checkpoint = Literal["best", "last"]
Image = str | Path | Tensor | NDArray[np.uint8] | Any
"""A file, `[3, H, W]` uint8 (tensor), `[H, W, 3]` uint8 (array), or a Pillow image; RGB."""


class Predictor:
    """A trained network and all that belongs to it; made by `sward.load`.

    Args:
        forward: maps images `[B, 3, H, W]`, as `metadata.input` says, to what `metadata.output` says.
        metadata: classes, sizes and origin.
        path: file or folder that it was loaded from.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], metadata: Metadata, path: Path) -> None:
        self.metadata, self.path = metadata, path
        self._forward = forward

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; their positions are the values of masks."""
        return self.metadata.classes

    @property
    def info(self) -> DatasetInfo:
        """Classes and colours."""
        return self.metadata.info()

    def forward(self, images: Tensor) -> Tensor:
        """Run the network on uint8 RGB `[B, 3, H, W]` at exactly this size.

        Returns:
            What `metadata.output` says, on the CPU: logits or probabilities `[B, K, H, W]`, or classes `[B, H, W]`.

        Raises:
            ValueError: if the file was exported with a fixed size and the images have another.
        """
        fixed = self.metadata.fixed_size
        if fixed is not None and tuple(images.shape[-2:]) != fixed:
            raise ValueError(
                f"images must be {fixed[0]} x {fixed[1]} pixels, got {images.shape[-2]} x {images.shape[-1]}; "
                f"{self.path} was exported with a fixed size"
            )
        return self._forward(as_input(images, self.metadata))

    def predict(
        self, image: Image, *, tile: tuple[int, int] | None = None, overlap: int | None = None
    ) -> NDArray[np.uint8]:
        """Predict the class of every pixel: class indices, uint8 `[H, W]`, at the size of the image.

        Args:
            image: a picture of any size.
            tile: height and width of tiles, predicted at the image's own resolution and blended; memory then does not
                grow with the image's height. None resizes the image to `metadata.image_size`, and the result back.
            overlap: pixels that neighbouring tiles share; None takes a quarter of the tile.

        Raises:
            ValueError: if the tile or overlap is wrong, or the file holds `argmax` and a tile is given.
        """
        self.check_tile(tile, overlap)
        bands = [self.to_labels(outputs).to(torch.uint8) for _, outputs in self.bands(self.read(image), tile, overlap)]
        return torch.cat(bands).numpy()

    def probabilities(
        self, image: Image, *, tile: tuple[int, int] | None = None, overlap: int | None = None
    ) -> NDArray[np.float32]:
        """Predict the probability of every class: float32 `[K, H, W]`, at the size of the image; see `predict`.

        Raises:
            ValueError: as `predict`, or if the file holds `argmax`.
        """
        self.check_tile(tile, overlap)
        self.check_probabilities()
        bands = [self.to_probabilities(outputs) for _, outputs in self.bands(self.read(image), tile, overlap)]
        return torch.cat(bands, dim=1).numpy()

    def bands(self, pixels: Tensor, tile: tuple[int, int] | None, overlap: int | None) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row of a band of the image and its outputs at the size of the image, from top to bottom.

        Outputs are logits or probabilities `[K, rows, W]`, or classes `[rows, W]`, as the file holds them.
        """
        if tile is None:
            yield 0, _resized(self.forward(self.resized(pixels)[None]), pixels.shape[-2:])[0]
        else:
            yield from blended_bands(self.forward, pixels, tile, default_overlap(tile) if overlap is None else overlap)

    def to_labels(self, outputs: Tensor) -> Tensor:
        """Return the classes `[rows, W]` of a band."""
        return labels_at(outputs[None], (outputs.shape[-2], outputs.shape[-1]))[0]

    def to_probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probabilities `[K, rows, W]` of a band."""
        return outputs if self.metadata.output == "probabilities" else outputs.softmax(0)

    def check_tile(self, tile: tuple[int, int] | None, overlap: int | None) -> None:
        """Raise ValueError if this file cannot be run on such tiles."""
        check_tile(tile, overlap)
        if tile is not None and self.metadata.output == "argmax":
            raise ValueError(f"output of {self.path} must be logits or probabilities for tiles, got argmax")

    def check_probabilities(self) -> None:
        """Raise ValueError if this file does not return what probabilities are computed from."""
        if self.metadata.output == "argmax":
            raise ValueError(f"output of {self.path} must be logits or probabilities, got argmax; export it again")

    def read(self, image: Image) -> Tensor:
        """Return an image as uint8 `[3, H, W]`, files as the run read them."""
        return as_pixels(image, self.metadata.image_range)

    def resized(self, pixels: Tensor) -> Tensor:
        """Resize uint8 `[3, H, W]` to the size at which the network was evaluated."""
        size = self.metadata.fixed_size or self.metadata.image_size
        return pixels if size is None else resize_image(pixels, size)

    def export(self, path: str | Path, **options: Any) -> Path:
        """Write these weights to a `.onnx` or `.pt2` file and prove it; options as in `sward.deploy.export_run`.

        Raises:
            ValueError: if this is itself an exported file, or `checkpoint` is given, which belongs to `sward.load`.
        """
        if self.metadata.opset is not None or self.path.suffix == ".pt2":
            raise ValueError(f"only a run or a checkpoint can be exported, got {self.path}")
        if "checkpoint" in options:
            raise ValueError(f"checkpoint must be given to sward.load, not to export, got {options['checkpoint']!r}")
        from sward.deploy.proof import export_run

        return export_run(Path(self.metadata.source), Path(path), **options).path


def load(path: str | Path, *, checkpoint: Checkpoint = "best", device: str | None = "cpu") -> Predictor:
    """Load a run folder, a checkpoint in one, or a file that `sward export` wrote.

    Args:
        path: a run folder; a `.pt` file in its `checkpoints`; a `.onnx` or `.pt2` file.
        checkpoint: which weights of a run folder.
        device: device of a run or checkpoint; None uses the GPU if there is one. Exported files run on the CPU.

    Raises:
        FileNotFoundError: if there is no such run or file.
        ValueError: if it is damaged, or was not written by this library.
        ModuleNotFoundError: if an ONNX file is given and `onnxruntime` is not installed.

    Examples:
        >>> import sward
        >>> network = sward.load(run)  # a run folder, or a file such as runs/demo/student.onnx
        >>> network.classes
        ('background', 'stripes', 'checks', 'dots', 'rings')
        >>> mask = network.predict(photo)  # a PIL image of 100 x 70 pixels
        >>> mask.shape, mask.dtype
        ((70, 100), dtype('uint8'))
    """
    path = Path(path)
    if path.suffix in (".onnx", ".pt2"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no exported network at {path}")
        return _load_onnx(path) if path.suffix == ".onnx" else _load_program(path)
    folder, weights = find_run(path, checkpoint)
    config, info, network = load_run(folder, weights)
    metadata = Metadata.of_run(config, info, weights)
    target = choose_device(device)
    deployed = DeployedNetwork(network).to(target)

    def forward(images: Tensor) -> Tensor:
        with torch.no_grad():
            return deployed(images.to(target)).cpu()

    return Predictor(forward, metadata, path)


def find_run(path: Path, checkpoint: Checkpoint = "best") -> tuple[Path, Path]:
    """Return the run folder of a path and the file of the weights: `checkpoint`, or the path itself if it is a file.

    Raises:
        ValueError: if a checkpoint does not lie in the folder of its run.
    """
    if path.suffix != ".pt":
        run = RunFolder(path)
        return path, run.best if checkpoint == "best" else run.last
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    # A checkpoint may be a link, as git-annex and DVC make them, or have one elsewhere.
    folders = [each.parent.parent for each in (path.absolute(), path.resolve())]
    folder = next((each for each in folders if (each / "config.json").exists()), None)
    if folder is None:
        raise ValueError(f"checkpoint must lie in RUN/checkpoints, beside the run's config.json, got {path}")
    return folder, path


def as_pixels(image: Image, image_range: tuple[float, float] | None = None) -> Tensor:
    """Return an image as uint8 `[3, H, W]`; files and Pillow images go through the rule of `sward.data.images`.

    Raises:
        ValueError: if the rule refuses it, a tensor is not uint8 `[3, H, W]`, or an array not uint8 `[H, W, 3]`.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, image_range)
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image must be a uint8 tensor [3, H, W], got {image.dtype} {list(image.shape)}")
        return image
    if not isinstance(image, np.ndarray):
        return read_opened(image, image_range)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def as_input(images: Tensor, metadata: Metadata) -> Tensor:
    """Return uint8 images `[B, 3, H, W]` as the input that the metadata names."""
    if metadata.input == "uint8":
        return images
    scaled = images.float() / 255
    if metadata.input == "float":
        return scaled
    mean, std = (torch.tensor(values)[:, None, None] for values in (metadata.mean, metadata.std))
    return (scaled - mean) / std


def labels_at(outputs: Tensor, size: tuple[int, int]) -> Tensor:
    """Return class indices `[B, *size]` of logits or probabilities `[B, K, h, w]`, or of class indices `[B, h, w]`."""
    if outputs.ndim == 4:
        return predicted_labels(outputs, size)
    return _resized(outputs, size).long()


def _resized(outputs: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(outputs.shape[-2:]) == tuple(size):
        return outputs
    if outputs.ndim == 4:
        return resize(outputs, size)
    return torch.nn.functional.interpolate(outputs[:, None], tuple(size), mode="nearest-exact")[:, 0]


def onnx_session(model: Path | bytes, threads: int | None = None) -> Any:
    """Open an ONNX file, or its content, on the CPU, with as many threads as torch uses by default.

    Raises:
        ValueError: if ONNX Runtime cannot read the file.
        ModuleNotFoundError: if `onnxruntime` is not installed.
    """
    from sward.deploy.export import require_onnx

    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own, one per cause
        name = "the model" if isinstance(model, bytes) else model
        raise ValueError(f"{name} must be an ONNX file, got one that ONNX Runtime cannot read: {error}") from error


def _load_onnx(path: Path) -> Predictor:
    session = onnx_session(path)
    metadata = Metadata.from_strings(session.get_modelmeta().custom_metadata_map, path)
    name = session.get_inputs()[0].name

    def forward(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return Predictor(forward, metadata, path)


def _load_program(path: Path) -> Predictor:
    import json

    extra = {"sward.json": ""}
    try:
        module = torch.export.load(path, extra_files=extra).module()
    except Exception as error:  # a changed byte can make torch raise anything
        raise ValueError(f"{path} must be a torch.export program, got a file that torch cannot read") from error
    metadata = Metadata.from_strings(json.loads(extra["sward.json"] or "{}"), path)

    def forward(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return Predictor(forward, metadata, path)
