"""A small data set in folders, for the tests of reading and packing image files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sward import data
from sward.data import packing
from sward.data.files import PairedFiles


def build(root: Path, split: str = "train", packed: str = "auto", **options: Any) -> PairedFiles:
    made = data.build(
        "folder", split, train=split == "train", root=root, num_classes=3, image_size=32, packed=packed, **options
    )
    assert isinstance(made, PairedFiles)
    return made


def pack(root: Path, output: Path | None = None, **options: Any) -> packing.PackResult:
    return packing.pack(data.build_for_packing("folder", root=root, num_classes=3), output, workers=2, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_samples(one: PairedFiles, other: PairedFiles, epochs: int = 3) -> None:
    assert len(one) == len(other)
    for epoch in range(epochs):
        one.set_epoch(epoch)
        other.set_epoch(epoch)
        for index in range(len(one)):
            a, b = one[index], other[index]
            assert a.name == b.name
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.labels, b.labels)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def write_pairs(root: Path, train: int = 4, val: int = 2, size: int = 32, classes: int = 2) -> Path:
    """Write a folder data set of random images and masks that hold every class; return `root`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind, shape, high in (("images", (size, size, 3), 256), ("masks", (size, size), classes)):
            folder = root / kind / split
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, high, shape, np.uint8)).save(folder / f"{split}{number}.png")
    return root


def wide_png(height: int, width: int) -> bytes:
    """A black colour PNG file of 16 bits per channel, which Pillow reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + 6 * width)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
