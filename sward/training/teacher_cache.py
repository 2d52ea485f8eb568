"""Cache of teacher features on disk, for training on fixed views of the images (`--dataset.views`)."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import pickle
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sward import atomic
from sward.losses.masks import teacher_fingerprint
from sward.models.teachers import DINOv2Trunk, HieraDemoTrunk, Teacher
from sward.training.teacher import FrozenTeacher

FORMAT = 1
_CHECKSUM_BYTES = 4


class TeacherCache:
    """A frozen teacher that runs once per image and reads its features from disk after that.

    For any teacher; where the teacher is a `sward.models.teachers.Teacher`, `TrunkCache` serves every method at once;
    `cached` chooses.

    Args:
        teacher: computes the features that are not there yet; every map it returns is kept.
        folder: of the cache; created if it is not there.
        origin: what decides the features besides weights, modules and layers, see `sward.models.registry.origin`.

    Attributes:
        files: the entries, with counts of hits and misses.
    """

    def __init__(self, teacher: FrozenTeacher, folder: Path, origin: str = "") -> None:
        self.teacher = teacher
        self.files = FeatureFiles(folder / _name(teacher, teacher.network, origin))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """`images [B, 3, H, W]` -> layer -> `[B, C, h, w]`, on the device of the images."""
        return self.files.batch(images, self.teacher)


class TrunkCache:
    """The maps of a frozen trunk on disk, one entry per image, for training its head and for every method.

    Set it as `Teacher.trunk_cache`. The head runs every time, so one cache serves logits and feature maps alike.

    Args:
        trunk: `[B, 3, H, W]` -> list of `[B, C_i, H_i, W_i]`; in eval mode, its weights fixed from now on.
        folder: of the cache; created if it is not there.
        origin: see `TeacherCache`.

    Attributes:
        files: the entries, with counts of hits and misses.
    """

    def __init__(self, trunk: nn.Module, folder: Path, origin: str = "") -> None:
        self.trunk = trunk
        self.files = FeatureFiles(folder / _name(trunk, trunk, origin))

    @torch.compiler.disable
    def __call__(self, images: Tensor) -> list[Tensor]:
        """`images [B, 3, H, W]` -> the trunk's maps, on the device of the images."""
        return list(self.files.batch(images, self._compute).values())

    def _compute(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {str(index): maps for index, maps in enumerate(self.trunk(images))}


def cached(teacher: FrozenTeacher, folder: Path, origin: str = "") -> FrozenTeacher | TeacherCache:
    """Return the teacher with a cache: of its trunk, unless a layer inside the trunk is caught, which then must run.

    Args:
        teacher: the teacher.
        folder: of the cache; created if it is not there.
        origin: see `TeacherCache`.
    """
    network = teacher.network
    if not isinstance(network, Teacher) or any(layer.split(".")[0] == "trunk" for layer in teacher.layers):
        return TeacherCache(teacher, folder, origin)
    network.trunk_cache = TrunkCache(network.trunk, folder, origin)
    return teacher


class FeatureFiles:
    """Feature maps in a folder, one file per image.

    The key of an entry is the SHA-256 of the tensor that the network sees. It covers image, crop, flip, colour and
    normalisation, so a changed transform never reads features of another one. The network runs on one image at a time,
    so an entry does not depend on its batch, and a run gives the same weights from an empty cache, from a full one and
    after a resume.

    Entries are written atomically, and verified when this object reads them first; a damaged one raises a warning and
    is computed again. Several processes may share a folder. If the disk is full, training continues without new
    entries.

    Args:
        folder: named after everything besides the image that decides the features.

    Attributes:
        hits: images whose features were read.
        misses: images whose features were computed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._verified: set[str] = set()
        self._full = False

    def batch(self, images: Tensor, compute: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`images [B, 3, H, W]` -> name -> `[B, C, h, w]`, on the device of the images.

        Args:
            images: normalised.
            compute: `[1, 3, H, W]` -> name -> `[1, C, h, w]`, called for an image without an entry.
        """
        entries = [self._features(image, compute) for image in images]
        # Also under a caller's inference mode: autograd may not keep a tensor that is made in it.
        with torch.inference_mode(False):
            return {name: torch.stack([entry[name] for entry in entries]).to(images.device) for name in entries[0]}

    def _features(self, image: Tensor, compute: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self.folder / f"{_digest(image, image.device.type, *_autocast(image.device))}.features"
        try:
            entry = _read(path, verify=path.name not in self._verified)
            self._verified.add(path.name)
            self.hits += 1
            return entry
        except FileNotFoundError:
            pass
        except (ValueError, pickle.UnpicklingError, RuntimeError, EOFError):
            warnings.warn(f"{path} is damaged; computing its teacher features again", stacklevel=4)
        self.misses += 1
        entry = {
            name: maps[0].detach().to("cpu", copy=True).contiguous() for name, maps in compute(image[None]).items()
        }
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
                stacklevel=5,
            )


def _name(settled: FrozenTeacher | nn.Module, network: nn.Module, origin: str) -> str:
    """Hash what determines a teacher's features besides the image: weights, modules, settings, layers, origin."""
    # Every plain attribute, so that settings added later are included.
    settings = {
        name: str(value)
        for name, value in vars(settled).items()
        if value is None or isinstance(value, str | int | float | tuple | torch.dtype)
    }
    decisive = [FORMAT, settings, type(network).__qualname__, teacher_fingerprint(network)]
    # All that can differ in these trunks of one class and weights is among their settings, and caches of them exist.
    if not isinstance(network, DINOv2Trunk | HieraDemoTrunk):
        decisive.append([(name, *_construction(module)) for name, module in network.named_modules()])
    if origin:  # Not otherwise: caches without one exist.
        decisive.append(origin)
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]


def _construction(module: nn.Module) -> tuple[str, dict[str, str]]:
    """Return the class of a module and the arguments it was made with: a stride or number of heads has no weights.

    Attributes that are no arguments may change from image to image, as a counter does.
    """
    makers = [vars(kind)["__init__"] for kind in type(module).__mro__ if "__init__" in vars(kind)]
    known = {name for maker in makers for name in inspect.signature(maker).parameters if not name.startswith("_")}
    arguments = {name: _text(value) for name, value in vars(module).items() if name in known}
    return type(module).__qualname__, {name: text for name, text in arguments.items() if text is not None}


def _text(value: Any) -> str | None:
    """Return a plain value or the name of a function as text that is the same in every process; None for others."""
    if inspect.isroutine(value):
        return str(value.__qualname__)
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return None


def _autocast(device: torch.device) -> tuple[str, ...]:
    return (str(torch.get_autocast_dtype(device.type)),) if torch.is_autocast_enabled(device.type) else ()


def _digest(tensor: Tensor, *more: str) -> str:
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)} {values.dtype} {more}".encode())
    digest.update(values.view(-1).view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()


def _read(path: Path, *, verify: bool) -> dict[str, Tensor]:
    with path.open("rb", buffering=0) as file:
        checksum = file.read(_CHECKSUM_BYTES)
        if verify and zlib.crc32(file.read()) != int.from_bytes(checksum, "big"):
            raise ValueError("wrong checksum")
        # Read from the file straight into the tensors.
        file.seek(_CHECKSUM_BYTES)
        entry: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return entry
