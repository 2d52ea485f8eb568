"""Export a run, and prove that the file predicts what the network predicts."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sward import atomic
from sward.config import TrainingConfig
from sward.data import DatasetInfo, denormalise
from sward.data.images import CorruptFileError
from sward.data.transforms import resize_image
from sward.deploy import export, int8
from sward.deploy.metadata import Metadata
from sward.deploy.network import DeployedNetwork, Input, Output
from sward.deploy.precision import CALIBRATION_IMAGES, SAMPLED_IMAGES, Precision, check_precision, save, to_fp16
from sward.deploy.predictor import Checkpoint, Predictor, as_input, find_run, labels_at, load, onnx_session
from sward.metrics import ConfusionMatrix, PerImageOverlap
from sward.runs.load import build_split, config_for_images, load_run
from sward.training.progress import Progress
from sward.training.run_folder import make_folder

TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-3, "int8": 1e-2}
"""Largest difference in mIoU and in Dice, as a fraction of 1, that the proof accepts."""

TIMED_RUNS = 10
TIMED_SECONDS = 5.0


@dataclass(frozen=True)
class Proof:
    """The exported file against the network in PyTorch, on the same images."""

    split: str
    """Split of the data set."""
    images: int
    """Number of images."""
    largest_difference: float
    """Largest difference between the two outputs (logits, probabilities or class indices) over all pixels."""
    differing_pixels: float
    """Share of pixels whose predicted class differs, at the resolution of the labels."""
    mean_iou: float | None
    """mIoU of the file; None if no pixel is labelled."""
    mean_iou_pytorch: float | None
    """mIoU of the network in PyTorch."""
    dice: float | None
    """Dice of the file, mean over images; None unless there are two classes."""
    dice_pytorch: float | None
    """Dice of the network in PyTorch."""
    mean_iou_evaluated: float | None
    """mIoU as `sward evaluate` finds it, from logits at the size of evaluation. Differs from that of PyTorch above
    where the file returns probabilities or classes, which are resized in place of logits, or has another size."""
    dice_evaluated: float | None
    """The same for Dice."""
    tolerance: float
    """Largest accepted loss in mIoU and in Dice."""
    milliseconds: float
    """Median time of the file for the first image."""
    milliseconds_pytorch: float
    """Median time of the network in PyTorch for the first image."""
    threads: int
    """Threads of both."""
    image_size: tuple[int, int]
    """Height and width of the first image."""
    bytes: int
    """Size of the file."""

    @property
    def failure(self) -> str | None:
        """What differs by more than the tolerance; None if the proof holds."""
        if not math.isfinite(self.largest_difference):
            return "outputs of the file must be finite where those of the network are, got infinity or nan"
        for name, mine, other in (
            ("mIoU", self.mean_iou, self.mean_iou_pytorch),
            ("Dice", self.dice, self.dice_pytorch),
        ):
            if mine is None or other is None:
                continue
            if abs(mine - other) > self.tolerance:
                return (
                    f"{name} of the file must be within {100 * self.tolerance:g} points of {100 * other:.2f} %, "
                    f"got {100 * mine:.2f} %"
                )
        return None


class ProofError(ValueError):
    """The exported file does not predict what the network predicts."""


@dataclass(frozen=True)
class Exported:
    """What `export_run` wrote."""

    run: Path
    """Folder of the run that it was made from."""
    path: Path
    """The exported file."""
    metadata: Metadata
    """What the file says about itself."""
    proof: Proof | None
    """Comparison with PyTorch; None if it was not wanted."""
    refused: dict[str, float] = field(default_factory=dict)
    """Layers that stay fp32 in an int8 file -> loss in mIoU with this layer alone in int8, as a fraction of 1."""

    @property
    def proof_path(self) -> Path:
        """The JSON file with metadata and proof."""
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def card_path(self) -> Path:
        """The model card, which the commands write."""
        return self.path.with_name(f"{self.path.name}.md")

    @property
    def failed_path(self) -> Path:
        """The JSON file of a proof that failed: nothing was written to `path`."""
        return self.path.with_name(f"{self.path.name}.failed.json")


def export_run(
    run: Path,
    path: Path,
    *,
    checkpoint: Checkpoint = "best",
    input: Input = "uint8",
    output: Output = "logits",
    size: tuple[int, int] | None = None,
    check: int | None = None,
    split: str = "val",
    root: Path | None = None,
    tolerance: float | None = None,
    precision: Precision = "fp32",
    calibrate: int = CALIBRATION_IMAGES,
    force: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write the network of a run to `path`, compare the file with PyTorch, and write `PATH.json`.

    Both appear together, once the proof holds; after an error an older file and its proof are as they were.

    Args:
        run: run folder, or a checkpoint in it.
        path: file to write; ends in `.onnx` or `.pt2`.
        checkpoint: which weights of a run folder.
        input: what the images of the file hold; see `sward.deploy.network.Input`.
        output: what the file returns; see `sward.deploy.network.Output`.
        size: height and width to limit the file to; None leaves them free.
        check: images to compare on; None takes the whole split, 0 skips the proof.
        split: split of the run's data set to compare on.
        root: folder that holds the data set; None uses that of the run.
        tolerance: largest accepted difference in mIoU and Dice, as a fraction of 1; None takes that of `TOLERANCES`.
        precision: number format of an ONNX file.
        calibrate: training images that set the ranges of int8.
        force: keep the file if the proof fails.
        overwrite: replace an existing file.

    Raises:
        ValueError: if an argument is wrong, the file exists, or the network cannot be exported.
        ProofError: if the proof fails and `force` is not set; `PATH.failed.json` then holds it, and there is no file.
        FileNotFoundError: if the run or its data set does not exist.
        ModuleNotFoundError: if a package for ONNX is not installed.
    """
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    check_arguments(path, check, tolerance, overwrite, size)
    check_precision(precision, path)
    if calibrate < 1:
        raise ValueError(f"calibrate must be at least 1, got {calibrate}")
    folder, weights = find_run(run, checkpoint)
    config, info, network = load_run(folder, weights)
    metadata = dataclasses.replace(Metadata.of_run(config, info, weights), input=input, output=output, fixed_size=size)
    config = config_for_images(folder, config, root)
    # Before the export, which takes longer: a data set that is not there is found out at once.
    images = None if check == 0 else evaluation_images(config, split, check)
    skips = config.on_corrupt == "skip"
    examples = evaluation_images(config, "train", calibrate, skip_corrupt=skips) if precision == "int8" else None
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as staging:
        written = Path(staging) / path.name
        metadata = export.write_network(network, metadata, written)
        proof, refused = None, {}
        if precision == "fp16":
            metadata = to_fp16(written, metadata)
        quantisation = None
        if examples is not None:
            quantisation = Quantisation(written, dataclasses.replace(metadata, precision="int8"), examples)
            metadata = quantisation.write()
        if images is not None:
            proof = prove(network, load(written), images, info, split=split, tolerance=tolerance)
            if quantisation is not None and proof.failure is not None and not force:
                refused = quantisation.refuse_layers(info, tolerance)
                if refused:
                    proof = prove(network, load(written), images, info, split=split, tolerance=tolerance)
        return finish(Exported(folder, path, metadata, proof, refused), written, force=force)


class Quantisation:
    """Writes an fp32 file as int8, and again without the layers that lose too much.

    Args:
        path: the fp32 file; `write` replaces it.
        metadata: of the int8 file.
        examples: training images that set the ranges of activations.
    """

    def __init__(self, path: Path, metadata: Metadata, examples: LabelledImages) -> None:
        self.path, self.metadata, self.examples = path, metadata, examples
        self.prepared = int8.prepare(path)
        self.model: Any = None

    def write(self, keep: Collection[str] = ()) -> Metadata:
        """Quantise all layers but `keep` and write the file."""
        images = (self._sized(image) for image, _ in self.examples.samples())
        self.model = int8.quantise(self.prepared, self.metadata, images, keep=keep)
        return save(self.model, self.metadata, self.path)

    def refuse_layers(self, info: DatasetInfo, tolerance: float) -> dict[str, float]:
        """Write the file again with the layers in fp32 that alone lose more than `tolerance` in mIoU.

        The loss is measured on the first `SAMPLED_IMAGES` calibration images, with one layer at a time in int8.

        Returns:
            Title -> loss of these layers. If there are none, the file stays as it is.
        """
        samples = list(islice(self.examples.samples(), SAMPLED_IMAGES))

        def mean_iou(model: bytes) -> float:
            session, scores = onnx_session(model), _Scores(info)
            for image, labels in samples:
                given = as_input(self._sized(image)[None], self.metadata).numpy()
                outputs = torch.from_numpy(session.run(None, {"images": given})[0])
                scores.update(labels_at(outputs, (labels.shape[-2], labels.shape[-1]))[0], labels)
            return scores.mean_iou() or 0.0

        losses = int8.losses_per_layer(self.prepared, self.model, mean_iou)
        refused = {name: loss for name, loss in losses.items() if loss > tolerance}
        if refused:
            self.write(keep=list(refused))
        return {int8.layer_title(self.prepared, name): loss for name, loss in refused.items()}

    def _sized(self, image: Tensor) -> Tensor:
        size = self.metadata.fixed_size
        return image if size is None else resize_image(image, size)


def check_arguments(
    path: Path, check: int | None, tolerance: float, overwrite: bool, size: tuple[int, int] | None
) -> None:
    """Raise ValueError for arguments of `export_run` that cannot work, before any work."""
    export.check_path(path)
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be two positive numbers, got {size[0]} {size[1]}")
    if check is not None and check < 0:
        raise ValueError(f"check must be at least 0, got {check}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    if path.exists() and not overwrite:
        raise ValueError(f"output must not exist yet, got {path}; replace it with --overwrite")


def finish(exported: Exported, written: Path, *, force: bool) -> Exported:
    """Move the written file to its place, with its JSON file; on a failed proof raise ProofError unless `force`."""
    proof = exported.proof
    shown = None if proof is None else asdict(proof)
    if shown is not None and not math.isfinite(shown["largest_difference"]):
        shown["largest_difference"] = None  # JSON has no infinity
    record = {"metadata": asdict(exported.metadata), "proof": shown, "fp32_layers": exported.refused}
    content = (json.dumps(record, indent=2) + "\n").encode()
    if proof is not None and proof.failure is not None and not force:
        atomic.write(exported.failed_path, content)
        raise ProofError(f"{proof.failure}; see {exported.failed_path}, or keep the file with --force")
    proven = written.with_name(exported.proof_path.name)
    atomic.write(proven, content)
    # First, so that no file ever stands beside the proof or the card of another one.
    for path in (exported.proof_path, exported.card_path) if exported.path.exists() else ():
        path.unlink(missing_ok=True)
    written.replace(exported.path)
    proven.replace(exported.proof_path)
    exported.failed_path.unlink(missing_ok=True)
    return exported


@dataclass(frozen=True)
class LabelledImages:
    """Images of an evaluation split as uint8, and their labels."""

    samples: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """Returns the images, uint8 `[3, H, W]` at the size of evaluation, and labels `[h, w]`."""
    count: int
    """Number of images."""


def evaluation_images(
    config: TrainingConfig, split: str, count: int | None, *, skip_corrupt: bool = False
) -> LabelledImages:
    """Return the first `count` images of a split, prepared as for evaluation.

    `skip_corrupt` takes the next images in place of damaged ones, as a training may have done; scores need every image.

    Raises:
        FileNotFoundError: if the data set does not exist.
        ValueError: if the data set has no such split.
    """
    dataset = build_split(config, split, train=False)
    length = len(dataset) if count is None else min(count, len(dataset))

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        taken = 0
        for index in range(len(dataset)):
            if taken == length:
                return
            try:
                sample = dataset[index]
            except CorruptFileError:
                if not skip_corrupt:
                    raise
                continue
            taken += 1
            yield denormalise(sample.image), sample.labels

    return LabelledImages(samples, length)


def prove(
    network: nn.Module,
    file: Predictor,
    images: LabelledImages,
    info: DatasetInfo,
    *,
    split: str,
    tolerance: float,
) -> Proof:
    """Compare an exported file with the network that it was made from.

    Args:
        network: the network in PyTorch, on the CPU.
        file: the exported file.
        images: images and labels to compare on; images of another size than that of the file are resized.
        info: classes of the data set.
        split: name of the split, for the record.
        tolerance: largest accepted difference in mIoU and Dice.
    """
    reference = DeployedNetwork(network, file.metadata.input, file.metadata.output)
    plain = DeployedNetwork(network, file.metadata.input)
    as_evaluated = file.metadata.output == "logits" and file.metadata.fixed_size in (None, file.metadata.image_size)
    scores = [_Scores(info), _Scores(info), _Scores(info)]
    largest, differing, pixels = 0.0, 0, 0
    with torch.no_grad(), Progress(f"prove {file.path.name}", images.count) as progress:
        for image, labels in images.samples():
            batch = (image if file.metadata.fixed_size is None else file.resized(image))[None]
            expected, found = reference(as_input(batch, file.metadata)), file.forward(batch)
            difference = (found.double() - expected.double()).abs().max().item()
            largest = max(largest, math.inf if math.isnan(difference) else difference)
            size = (labels.shape[-2], labels.shape[-1])
            logits = expected if as_evaluated else plain(as_input(image[None], file.metadata))
            predictions = [labels_at(outputs, size)[0] for outputs in (found, expected, logits)]
            differing += int((predictions[0] != predictions[1]).sum())
            pixels += labels.numel()
            for each, prediction in zip(scores, predictions):
                each.update(prediction, labels)
            progress.advance()
        first = next(islice(images.samples(), 1))[0]
        first = (first if file.metadata.fixed_size is None else file.resized(first))[None]
        mine = median_milliseconds(lambda: file.forward(first))
        other = median_milliseconds(lambda: reference(as_input(first, file.metadata)))
    return Proof(
        split=split,
        images=images.count,
        largest_difference=largest,
        differing_pixels=differing / pixels,
        mean_iou=scores[0].mean_iou(),
        mean_iou_pytorch=scores[1].mean_iou(),
        dice=scores[0].dice(),
        dice_pytorch=scores[1].dice(),
        mean_iou_evaluated=scores[2].mean_iou(),
        dice_evaluated=scores[2].dice(),
        tolerance=tolerance,
        milliseconds=mine,
        milliseconds_pytorch=other,
        threads=torch.get_num_threads(),
        image_size=(first.shape[-2], first.shape[-1]),
        bytes=file.path.stat().st_size,
    )


class _Scores:
    """mIoU, and Dice if there are two classes."""

    def __init__(self, info: DatasetInfo) -> None:
        self.matrix = ConfusionMatrix(info.num_classes, info.ignore_index)
        self.overlap = PerImageOverlap(ignore_index=info.ignore_index) if info.num_classes == 2 else None

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        self.matrix.update(prediction, labels)
        if self.overlap is not None:
            self.overlap.update(prediction, labels)

    def mean_iou(self) -> float | None:
        return _finite(self.matrix.mean_iou())

    def dice(self) -> float | None:
        return None if self.overlap is None else _finite(self.overlap.mean_dice())


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def median_milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of `run`, after one warm-up, over at most `TIMED_RUNS` calls or `TIMED_SECONDS`."""
    run()
    times: list[float] = []
    while len(times) < TIMED_RUNS and sum(times) < TIMED_SECONDS:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)
