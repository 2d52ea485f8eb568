"""Images without masks, for the terms of distillation that need no labels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from sward import distributed
from sward.data.files import PairedFiles, shortened, stored, unique_ends
from sward.data.images import (
    CorruptFileError,
    Header,
    check_depth,
    check_end,
    open_image,
    read_header,
    read_image,
)
from sward.data.layouts import MASK_FOLDERS, SUFFIXES_OF_MASKS, list_tree
from sward.data.packed import FOLDER, Index, PackedFrames, find_pack
from sward.data.sample import (
    IGNORE_INDEX,
    Batch,
    DatasetInfo,
    DatasetNotFoundError,
    Pair,
    SegmentationDataset,
    sample_seed,
)
from sward.data.transforms import EvaluationTransform, TrainingTransform

INFO = DatasetInfo("unlabelled", (), ())
"""What the pack of a folder of unlabelled images says of it."""


class UnlabelledFolder(PairedFiles):
    """All images in a folder and below, without labels, to be packed.

    Raises:
        DatasetNotFoundError: the folder does not exist or holds no image.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(INFO, folder, _pairs(folder), EvaluationTransform((1, 1)), seed=0)

    def read_files(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Decode an image; its labels are all ignored."""
        image = read_image(pair.image, self.image_range)
        return image, torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)


class UnlabelledImages(PairedFiles):
    """Images of folders and lists, as training samples whose labels say where the picture is; see `inside_labels`.

    Args:
        sources: folders, of which all images in them and below are used but masks, and text files with the path of
            one image per line, relative to the file. The frames of `like` whose masks are not used come on top.
        like: the training set that they are mixed with; they get its classes, transforms, views and reading options.
        image_size: `(height, width)` of the samples.
        seed: seed of the run; order and augmentation draw from streams of their own.
        packed: `"none"` decodes the files; otherwise folders are read from their packs, if they have one, and the
            frames of `like` from the pack that `packed` names (see `sward.data.packed.find_pack`).

    Raises:
        DatasetNotFoundError: a source does not exist or names no image.
        FileNotFoundError: an image of a list does not exist.
        ValueError: a source is neither a folder nor a text file.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        like: SegmentationDataset,
        image_size: tuple[int, int],
        seed: int,
        *,
        packed: str = "auto",
    ) -> None:
        pairs = list(like.unlabelled) if isinstance(like, PairedFiles) else []
        found = {source: _pairs(source) for source in map(Path, sources)}
        # Two folders `images` must not hold frames of one name.
        for end, (source, part) in zip(unique_ends(list(found)), found.items()):
            pairs += [pair._replace(name=end + pair.name.removeprefix(source.name)) for pair in part]
        assert isinstance(like.transform, TrainingTransform)
        super().__init__(
            like.info, Path(sources[0]) if sources else Path(), pairs, like.transform.at(image_size), stream_seed(seed)
        )
        self.views, self.teacher_transform = like.views, like.teacher_transform
        if isinstance(like, PairedFiles):
            self.image_range = like.image_range
            self.set_on_corrupt(like.on_corrupt)
        self._places: list[tuple[PackedFrames, int] | None] = []
        if isinstance(like, PairedFiles) and like.unlabelled:
            info = like.info
            pack = find_pack(packed, info.name, info.num_classes, like.folder, like.unlabelled, decoding=like.decoding)
            self._places += _places(pack, len(like.unlabelled))
        for source, part in found.items():
            pack = None
            if packed != "none" and source.is_dir() and _has_own_pack(source):
                pack = find_pack("auto", INFO.name, INFO.num_classes, source, part, decoding=self.decoding)
            self._places += _places(pack, len(part))

    def check(self) -> None:
        """Look at every image that no pack holds, its header and its end; every process of a group must call this.

        Raises:
            ValueError: an image cannot be used. Where `on_corrupt` is `"skip"`, damaged ones may stay.
        """
        mine = range(distributed.rank(), len(self), distributed.world_size())
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
            found = [problem for problem in executor.map(self._problem, mine) if problem is not None]
        wrong = [problem for part in distributed.gather(found) for problem in part]
        if wrong:
            raise ValueError(wrong[0] + (f" (and {len(wrong) - 1} more unlabelled images)" if len(wrong) > 1 else ""))

    def _problem(self, index: int) -> str | None:
        path = self.pairs[index].image
        if self._packed_place(index) is not None:
            return None
        try:
            # Opening says why a header cannot be read.
            header = read_header(path) or Header.of(open_image(path))
            check_depth(path, header, self.image_range)
            check_end(path, header)
        except CorruptFileError as error:
            return None if self.on_corrupt == "skip" else str(error)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return None

    def _packed_place(self, index: int) -> tuple[PackedFrames, int] | None:
        place = self._places[index]
        return place if place is not None and place[1] in place[0] else None

    def _read(self, index: int) -> tuple[Tensor, Tensor, str]:
        place = self._packed_place(index)
        if place is None:
            return super()._read(index)
        frames, number = place
        image, _ = frames.read(number)
        return image, inside_labels(image), self.pairs[index].name

    def read_files(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Decode an image; see `inside_labels`."""
        image = read_image(pair.image, self.image_range)
        return image, inside_labels(image)


def inside_labels(image: Tensor) -> Tensor:
    """Return labels of 0 for an image without labels; transforms put 255 where they fill the picture's surroundings.

    The training loop ignores both, or puts pseudo-labels in place of the 0.
    """
    return torch.zeros(image.shape[1:], dtype=torch.uint8)


def _places(frames: PackedFrames | None, count: int) -> list[tuple[PackedFrames, int] | None]:
    return [None] * count if frames is None else [(frames, number) for number in range(count)]


def _has_own_pack(source: Path) -> bool:
    """Return whether a folder holds a pack of its images alone, not one of images and masks."""
    try:
        return Index.read(source / FOLDER).dataset == INFO.name
    except FileNotFoundError:
        return False
    except ValueError:
        return True  # Damaged: reading it says so.


def _pairs(source: Path) -> list[Pair]:
    """Return the images of a folder or a list, each as its own mask."""
    images = _without_masks(source, list_tree(source)) if source.is_dir() else _listed(source)
    if not images:
        raise DatasetNotFoundError(
            f"unlabelled must name folders of images or lists of them, got {source}, which holds none"
        )
    return [Pair(f"{source.name}/{name}", image, image) for name, image in images.items()]


def _without_masks(source: Path, images: dict[str, Path]) -> dict[str, Path]:
    """Leave out the masks of a folder that holds images and masks, and say so."""
    suspected = {name for name in images if {part.lower() for part in Path(name).parts[:-1]} & set(MASK_FOLDERS)}
    stems = {Path(name).name for name in images if name not in suspected}
    masks = [
        name
        for name in images
        if (name in suspected and any(Path(name).name.removesuffix(end) in stems for end in SUFFIXES_OF_MASKS))
        or any(name.endswith(end) and name.removesuffix(end) in images for end in SUFFIXES_OF_MASKS if end)
    ]
    if masks:
        warnings.warn(
            f"{len(masks)} files in {source} are left out, since their folder or name says that they are masks: "
            f"{shortened(masks)}",
            stacklevel=3,
        )
    left_out = set(masks)
    return {name: image for name, image in images.items() if name not in left_out}


def _listed(path: Path) -> dict[str, Path]:
    """Read a list of images as name -> file; empty where there is no file."""
    try:
        # Line by line: a video that was named by mistake must not be read whole.
        with path.open(encoding="utf-8-sig") if path.is_file() else nullcontext(()) as lines:
            names = [line.strip() for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"unlabelled must name folders, or text files in UTF-8 with the path of one image per line, got {path}"
        ) from error
    found = dict(zip(names, stored(path.parent / name for name in names)))
    missing = next((image for image in found.values() if not image.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"there is no file {missing}, which {path} names")
    return found


def stream_seed(seed: int) -> int:
    """Return the seed of the unlabelled images of a run, so that the labelled ones are the same with and without."""
    return sample_seed(seed, 0, 2**32)


def join(labelled: Batch, unlabelled: Batch) -> Batch:
    """Return one batch of both, the labelled images first."""
    teacher = labelled.teacher_images, unlabelled.teacher_images
    return Batch(
        torch.cat([labelled.images, unlabelled.images]),
        torch.cat([labelled.labels, unlabelled.labels]),
        labelled.names + unlabelled.names,
        None if teacher[0] is None or teacher[1] is None else torch.cat([teacher[0], teacher[1]]),
    )
