"""Teacher features on disk, for training on images that come again (`--dataset.views`)."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
import zlib
from pathlib import Path

import torch
from torch import Tensor

from sward import atomic
from sward.losses.masks import teacher_fingerprint
from sward.training.teacher import FrozenTeacher

FORMAT = 1
_CHECKSUM_BYTES = 4


class TeacherCache:
    """A frozen teacher that runs once for each image and reads its features from disk after that.

    An entry is found by the SHA-256 of the very tensor the teacher sees. So image, crop, flip, colour and
    normalisation are all in the key, and another transform can never meet features that are not its own. Entries lie
    in a folder named by the teacher: weights, layers, precision and kind of device. The teacher sees one image at a
    time, so an entry does not depend on the batch it was made in, and a run gives the same weights from an empty cache,
    from a full one and after a resume.

    An entry appears under its name only once it is whole, and is checked when it is read; a damaged one is warned of
    and made again. Several processes may share a cache. When the disk is full, training goes on without new entries.

    Args:
        teacher: what to ask for features that are not there; every map it hands out is kept.
        folder: of the cache; made if it is not there.

    Attributes:
        hits: images whose features were read.
        misses: images that the teacher had to run for.
    """

    def __init__(self, teacher: FrozenTeacher, folder: Path) -> None:
        self.teacher = teacher
        self.folder = folder / fingerprint(teacher)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._full = False

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """`images [B, 3, H, W]` -> layer -> `[B, C, h, w]`, on the device of the images."""
        entries = [self._features(image) for image in images]
        return {
            layer: torch.stack([entry[layer] for entry in entries]).to(images.device) for layer in self.teacher.layers
        }

    def _features(self, image: Tensor) -> dict[str, Tensor]:
        path = self.folder / f"{_digest(image, image.device.type)}.features"
        try:
            entry = _read(path)
            self.hits += 1
            return entry
        except FileNotFoundError:
            pass
        except (ValueError, pickle.UnpicklingError, RuntimeError, EOFError):
            warnings.warn(f"{path} is damaged: its teacher features are computed again", stacklevel=3)
        self.misses += 1
        maps = self.teacher(image[None])
        entry = {layer: maps[layer][0].detach().to("cpu", copy=True).contiguous() for layer in self.teacher.layers}
        self._write(path, entry)
        return entry

    def _write(self, path: Path, entry: dict[str, Tensor]) -> None:
        if self._full:
            return
        buffer = io.BytesIO()
        torch.save(entry, buffer)
        payload = buffer.getbuffer()
        try:
            with atomic.replacing(path, shared=True, durable=False) as file:
                file.write(zlib.crc32(payload).to_bytes(_CHECKSUM_BYTES, "big"))
                file.write(payload)
        except OSError as error:
            self._full = True
            warnings.warn(
                f"teacher features can no longer be kept in {self.folder} ({error.strerror}): the teacher runs for the "
                "rest of the images",
                stacklevel=4,
            )


def fingerprint(teacher: FrozenTeacher) -> str:
    """A name for all that decides a teacher's features besides the image: weights, settings and layers."""
    # Every plain attribute, so that a setting added to the teacher one day is not forgotten here.
    settings = {
        name: str(value)
        for name, value in vars(teacher).items()
        if value is None or isinstance(value, str | int | float | tuple | torch.dtype)
    }
    network = (type(teacher.network).__qualname__, teacher_fingerprint(teacher.network))
    return hashlib.sha256(json.dumps([FORMAT, settings, *network], sort_keys=True).encode()).hexdigest()[:24]


def _digest(tensor: Tensor, *more: str) -> str:
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)} {values.dtype} {more}".encode())
    digest.update(values.view(-1).view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    content = path.read_bytes()
    payload = memoryview(content)[_CHECKSUM_BYTES:]
    if zlib.crc32(payload) != int.from_bytes(content[:_CHECKSUM_BYTES], "big"):
        raise ValueError("wrong checksum")
    entry: dict[str, Tensor] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return entry
