"""Checksums of the files of a data set, which tell whether a frame has changed or is the same as another one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sward import distributed
from sward.data.files import PairedFiles
from sward.data.sample import Pair, SegmentationDataset

PIECE = 2**14
"""Bytes that are read at the start, in the middle and at the end of a file."""
WHOLE = 2**20
"""Largest size in bytes of a file that is read whole."""
UNREADABLE = "unreadable"
"""Stands for the checksum of a file that cannot be read."""


def frame_sums(dataset: SegmentationDataset) -> dict[str, str]:
    """Return the name of each frame -> checksums of its image and its mask; nothing for a data set without files.

    Files above `WHOLE` bytes count by their size and three pieces, so a change elsewhere in them is not noticed.
    Processes of a group share the work; every one of them must call this.
    """
    if not isinstance(dataset, PairedFiles):
        return {}
    mine = dataset.pairs[distributed.rank() :: distributed.world_size()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        sums = list(executor.map(_sum_of_pair, mine))
    parts = distributed.gather({pair.name: each for pair, each in zip(mine, sums)})
    return {name: each for part in parts for name, each in sorted(part.items())}


def digest(sums: Mapping[str, str]) -> str:
    """Return one checksum of all frames, whatever their order."""
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Say what differs between two results of `frame_sums`; None if nothing does."""
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"frame {name!r} is missing"
        if name not in before:
            return f"frame {name!r} is new"
        if before[name] != now[name]:
            changed = "image" if image_sum(before[name]) != image_sum(now[name]) else "mask"
            return f"the {changed} of frame {name!r} has changed"
    return None


def known_images(known: Mapping[str, str], sums: Mapping[str, str]) -> list[str]:
    """Return the names in `sums` whose image is one of those in `known`, under any name."""
    images = {image_sum(each) for each in known.values()} - {UNREADABLE}
    return [name for name, each in sums.items() if image_sum(each) in images]


def image_sum(pair: str) -> str:
    """Return the checksum of the image out of those of a frame."""
    return pair.split()[0]


def _sum_of_pair(pair: Pair) -> str:
    return f"{_sum(pair.image)} {_sum(pair.mask)}"


def _sum(path: Path) -> str:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= WHOLE:
                content = file.read()
            else:
                content = b""
                for start in (0, size // 2, size - PIECE):
                    file.seek(start)
                    content += file.read(PIECE)
    except OSError:
        return UNREADABLE
    return hashlib.blake2b(content + size.to_bytes(8, "big"), digest_size=8).hexdigest()
