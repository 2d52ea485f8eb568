"""Cache of teacher features on disk, for training on fixed views of the images (`--dataset.views`)."""

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
    """A frozen teacher that runs once per image and reads its features from disk afterwards.

    The key of an entry is the SHA-256 of the tensor that the teacher sees. It covers image, crop, flip, colour and
    normalisation, so a changed transform never reads features of another one. Entries lie in a folder named after the
    teacher's weights, layers and precision; the kind of device is part of the key. The teacher runs on one image at a
    time, so an entry does not depend on its batch, and a run gives the same weights from an empty cache, from a full
    one and after a resume.

    Entries are written atomically and verified on reading; a damaged one raises a warning and is computed again.
    Several processes may share a cache. If the disk is full, training continues without new entries.

    Args:
        teacher: computes the features that are missing; every map it returns is stored.
        folder: folder of the cache; created if necessary.

    Attributes:
        hits: images whose features were read.
        misses: images that the teacher ran for.
    """

    def __init__(self, teacher: FrozenTeacher, folder: Path) -> None:
        self.teacher = teacher
        self.folder = folder / fingerprint(teacher)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._full = False

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of `images [B, 3, H, W]`: layer -> `[B, C, h, w]`, on the device of the images."""
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
            warnings.warn(f"{path} is damaged; computing its teacher features again", stacklevel=3)
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
                f"cannot write teacher features to {self.folder} ({error.strerror}); the teacher runs for the "
                "remaining images",
                stacklevel=4,
            )


def fingerprint(teacher: FrozenTeacher) -> str:
    """Hash everything that determines a teacher's features besides the image: weights, settings and layers."""
    # Every plain attribute, so that settings added to the teacher later are included.
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
