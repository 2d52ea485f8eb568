"""CVC-ClinicDB (Bernal et al., CMIG 2015) and CVC-ColonDB (Bernal et al., Pattern Recognition 2012).

Frames of one colonoscopy sequence look alike, so with a random split the network sees the test polyps during training.
There are these ways to split:

- `"sequence"` (default): no sequence is in two splits. ClinicDB has 428 / 75 / 109 frames, ColonDB 302 / 41 / 37. The
  lists are `lists/seq_{split}.txt` beside the images if they exist, else the table in `sward/data/splits`.
- `"ratio"`: a random 80 / 10 / 10 split, as in the paper (ClinicDB 490 / 61 / 61; ColonDB 240 / 30 / 30 of the release
  with 300 frames, 304 / 38 / 38 of that with 380). The paper does not publish its split; this one is fixed: frames are
  ranked by the SHA-256 of their number, the first tenth is val, the second test.
- `"parity"`, ColonDB only: frames of sequences with an even number are train (148), those of odd ones test (232), for
  networks that learn from the images of one half and are tested on polyps of the other.
- a path: either one text file per split, given with the placeholder `{split}` (`lists/my_{split}.txt`, one frame name
  per line), or one CSV file with the columns `frame_id` and `split`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sward.data.files import PairedFiles, locate, pair_by_name
from sward.data.lists import listed, listed_splits
from sward.data.masks import black_and_white
from sward.data.sample import DatasetInfo, DatasetNotFoundError, Pair
from sward.data.transforms import EvaluationTransform, polyp_training

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val", "test")
ALL = "all"
RULES = ("sequence", "ratio")
SPLITS_FOLDER = Path(__file__).parent / "splits"
MASK_THRESHOLD = 127
LAYOUTS = (
    ("images", "masks"),
    ("Original", "Ground Truth"),
    ("PNG/Original", "PNG/Ground Truth"),
    ("TIF/Original", "TIF/Ground Truth"),
    ("TIFF/Original", "TIFF/Ground Truth"),
)


@dataclass(frozen=True)
class Release:
    """Properties of a polyp data set; `frames` are the numbers of frames of its published versions."""

    info: DatasetInfo
    title: str
    folders: tuple[str, ...]
    frames: tuple[int, ...]
    source: str


def _info(name: str) -> DatasetInfo:
    return DatasetInfo(name, ("background", "polyp"), ((0, 0, 0), (255, 255, 255)))


CLINICDB = Release(
    info=_info("cvc_clinicdb"),
    title="CVC-ClinicDB",
    folders=("cvc_clinicdb", "CVC-ClinicDB"),
    frames=(612,),
    source="download it from https://polyp.grand-challenge.org/CVCClinicDB and unpack it as cvc_clinicdb",
)
COLONDB = Release(
    info=_info("cvc_colondb"),
    title="CVC-ColonDB",
    folders=("cvc_colondb", "CVC-ColonDB"),
    frames=(300, 380),
    source="request it at http://vi.cvc.uab.es/colon-qa/cvccolondb and unpack it as cvc_colondb",
)


class Polyps(PairedFiles):
    """Colonoscopy frames with polyp masks, 2 classes; a mask pixel is polyp where it is above 127.

    Training: flips, rotation, resize to `image_size`, colour jitter (`transforms.polyp_training`). Evaluation: image
    resized to `image_size`, labels at the resolution of the mask.

    Args:
        release: `CLINICDB` or `COLONDB`.
        root: folder with `images` and `masks`, or `Original` and `Ground Truth` (also below `PNG` or `TIF`), or a
            folder that contains it under one of the names `release.folders`.
        split: `train`, `val` or `test`; `all` has every frame, for networks trained on another data set.
        image_size: `(height, width)`.
        split_by: `"sequence"`, `"ratio"`, `"parity"` or a path; see the module docstring.
        train: use the training transform instead of the evaluation transform.
        seed: seed of the augmentation; the split does not depend on it.

    Attributes:
        assignment: frame -> split where the split is a list, else empty.

    Raises:
        DatasetNotFoundError: folders are missing, or the number of frames is not that of the release (with
            `"sequence"` or `"ratio"`).
        FileNotFoundError: the split list does not exist.
        ValueError: the split is unknown, an image has no mask, or a list names a frame that does not exist or is in
            two splits.
    """

    def __init__(
        self,
        release: Release,
        root: Path,
        split: str,
        image_size: tuple[int, int],
        *,
        split_by: str = "sequence",
        train: bool,
        seed: int = 0,
    ) -> None:
        if split not in (*SPLITS, ALL):
            raise ValueError(f"split must be {', '.join(SPLITS)} or {ALL} for {release.info.name}, got {split!r}")
        folder = locate(release.title, root, release.folders, LAYOUTS, release.source)
        images, masks = next(layout for layout in LAYOUTS if all((folder / part).is_dir() for part in layout))
        frames = {pair.name: pair for pair in pair_by_name(folder / images, folder / masks)}
        transform = polyp_training(image_size) if train else EvaluationTransform(image_size)
        pairs = _select(release, folder, frames, split, split_by)
        super().__init__(release.info, folder, pairs, transform, seed)
        if split != ALL and _table(release, split_by) is None:
            self.assignment = listed_splits(split_by, split)

    def decode(self, mask: Image, path: Path) -> NDArray[np.uint8]:
        """Return 1 where the mask is above 127."""
        return black_and_white(mask, path, self.info.classes, MASK_THRESHOLD)


def _select(release: Release, folder: Path, frames: dict[str, Pair], split: str, split_by: str) -> list[Pair]:
    counted = split_by in RULES
    if counted and len(frames) not in release.frames:
        raise DatasetNotFoundError(
            f"{release.title} in {folder} is incomplete: it must have {' or '.join(map(str, release.frames))} images, "
            f"got {len(frames)}; {release.source}, or name the frames to use with split_by=<list>"
        )
    if split == ALL:
        return list(frames.values())
    if not counted:
        return _pick(frames, *listed(str(_table(release, split_by) or split_by), split))
    if split_by == "ratio":
        return [frames[name] for name in _draw(frames)[split]]
    shipped = {each: folder / "lists" / f"seq_{each}.txt" for each in SPLITS}
    absent = [path for path in shipped.values() if not path.is_file()]
    if len(absent) < len(shipped):
        if absent:
            raise DatasetNotFoundError(
                f"{release.title} in {folder} is incomplete: there is no {absent[0].name} beside the other lists in "
                f"{absent[0].parent}; the packaged split would share frames with them"
            )
        lists = str(folder / "lists" / "seq_{split}.txt")
        # The other lists too: a frame that is in two of them would be trained on and scored.
        listed_splits(lists, split)
        return _pick(frames, *listed(lists, split))
    table = SPLITS_FOLDER / f"{release.info.name}.csv"
    wanted = set(listed(str(table), split)[0])
    known = {name for other in SPLITS for name in listed(str(table), other)[0]}
    unknown = next((name for name in frames if name not in known), None)
    if unknown is not None:
        raise ValueError(
            f"frames of {release.title} must be numbered 1 to {max(release.frames)} to split by sequence, got "
            f"{unknown!r} in {folder}; use split_by='ratio' or a list"
        )
    return [pair for name, pair in frames.items() if name in wanted]


def _table(release: Release, split_by: str) -> Path | None:
    """Return the packaged table of a rule; None for the path of a list."""
    table = SPLITS_FOLDER / f"{release.info.name}{'' if split_by in RULES else f'_{split_by}'}.csv"
    return table if table.is_file() else None


def _pick(frames: dict[str, Pair], wanted: list[str], source: Path) -> list[Pair]:
    if not wanted:
        raise ValueError(f"the split list {source} names no frame for this split")
    missing = next((name for name in wanted if name not in frames), None)
    if missing is not None:
        raise ValueError(f"the split list {source} names frame {missing!r}, which does not exist")
    return [frames[name] for name in wanted]


def _draw(names: Iterable[str]) -> dict[str, list[str]]:
    """Split 80 / 10 / 10 in an order that does not depend on the random generator of any library."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    tenth = round(len(ranked) / 10)
    return {"val": ranked[:tenth], "test": ranked[tenth : 2 * tenth], "train": ranked[2 * tenth :]}
