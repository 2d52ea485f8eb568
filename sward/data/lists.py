"""Read lists that say which frame belongs to which split."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Name of a split -> the names that its folder, and the words that a list or table, may have for it."""
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
"""Name of a folder, or word in lower case -> the split that it stands for."""


def listed(split_by: str, split: str, *, choices: str = "'sequence', 'ratio'") -> tuple[list[str], Path]:
    """Read the frame names of a split from a list, each once, in the order of the list; also return the file.

    Args:
        split_by: path of one text file per split with the placeholder `{split}` and one name per line, or of one CSV
            file with the columns `frame_id` and `split`.
        split: name of the split.
        choices: what `split_by` may be besides, for the message.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is neither, names a frame in two splits, or has a word that is no split.
    """
    path = Path(split_by.replace("{split}", split))
    if not path.is_file():
        raise FileNotFoundError(
            f"split_by (--split) must be {choices} or the path of a list, got {split_by!r}; there is no file {path}"
        )
    if "{split}" in split_by:
        return _names(path), path
    assigned = read_assignment(path)
    return [name for name, place in assigned.items() if place == split.lower()], path


def listed_splits(split_by: str, split: str, *, choices: str = "'sequence', 'ratio'") -> dict[str, str]:
    """Read a list as frame -> split, for train, val and test.

    Args:
        split_by, choices: as in `listed`.
        split: the split that must be listed; of lists with the placeholder `{split}`, others may be missing.

    Raises:
        FileNotFoundError, ValueError: as in `listed`; also if two files name a frame.
    """
    assigned: dict[str, str] = {}
    for each in SPLITS:
        if each != split and "{split}" in split_by and not Path(split_by.replace("{split}", each)).is_file():
            continue
        for name in listed(split_by, each, choices=choices)[0]:
            if assigned.setdefault(name, each) != each:
                raise ValueError(f"frame {name!r} must be in one split, got {assigned[name]} and {each} in {split_by}")
    return assigned


def read_assignment(path: Path) -> dict[str, str]:
    """Read a CSV file with the columns `frame_id` and `split` as frame -> split; `""` for a frame in none.

    Raises:
        ValueError: a column is missing, a frame is in two splits, or a word is no split.
    """
    assigned: dict[str, str] = {}
    otherwise = ", or its path must contain the placeholder {split}"
    for row in read_table(path, ("frame_id", "split"), title="the split list", otherwise=otherwise):
        name = composed(row["frame_id"])
        split = meant_split(row["split"], name, path)
        if assigned.setdefault(name, split) != split:
            raise ValueError(
                f"frame {name!r} must be in one split, got {assigned[name]} and {split} in the split list {path}"
            )
    return assigned


def meant_split(word: str, frame: str, file: Path) -> str:
    """Return the split that a file means by a word for a frame; `""` for no word.

    Raises:
        ValueError: the word is no split.
    """
    split = SPLIT_OF.get(word.lower(), "")
    if word and not split:
        raise ValueError(f"the split of frame {frame!r} in {file} must be train, val, test or empty, got {word!r}")
    return split


def read_table(path: Path, columns: tuple[str, ...], *, title: str, otherwise: str = "") -> list[dict[str, str]]:
    """Read the rows of a CSV file; commas or semicolons, spaces around values and a byte-order mark are accepted.

    Args:
        path: the file.
        columns: columns that it must have; others may be there.
        title: what the file is, for the message.
        otherwise: what would be right too, for the message.

    Raises:
        ValueError: a column is missing, or the text is not UTF-8.
    """
    text = _text(path, title)
    first = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text), delimiter=";" if ";" in first and "," not in first else ",")
    rows = [[value.strip() for value in line] for line in lines if any(value.strip() for value in line)]
    names = [name.lower() for name in rows[0]] if rows else []
    if not set(columns) <= set(names):
        raise ValueError(
            f"{title} {path} must be a CSV file with the columns {' and '.join(columns)}{otherwise}, got "
            f"{', '.join(names[:8]) or 'an empty file'}"
        )
    return [dict(zip(names, [*row, *[""] * len(names)])) for row in rows[1:]]


def _text(path: Path, title: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{title} {path} must be UTF-8 text, got the byte {error.object[error.start]:#x}") from error


def _names(path: Path) -> list[str]:
    lines = _text(path, "the split list").splitlines()
    return list(dict.fromkeys(composed(line.strip()) for line in lines if line.strip()))


def composed(name: str) -> str:
    """Return a name in composed Unicode (NFC), in which names are compared: macOS stores decomposed ones."""
    return unicodedata.normalize("NFC", name)


def is_ratio(split_by: str) -> bool:
    """Return whether `split_by` is shares of train, val and perhaps test, such as `80/10/10`."""
    return bool(re.fullmatch(r"\d+/\d+(/\d+)?", split_by))


def draw_splits(names: Sequence[str], ratio: str, *, seed: int = 0, group_by: str | None = None) -> dict[str, str]:
    """Assign every frame to train, val or test, in an order that depends on the names and the seed alone.

    Groups are ranked by the SHA-256 of the seed and their name. The first fill val, the next test, the others train.

    Args:
        names: the frames.
        ratio: shares of train, val and test that add up to 100; `"90/10"` has no test.
        seed: another number draws another split.
        group_by: a regular expression whose first group (or whole match) is the group of a frame, or a CSV file with
            the columns `frame_id` and `group`; None takes every frame as its own group.

    Raises:
        ValueError: the shares do not add up to 100 or leave out train or val, a frame has no group, or a split would be
            empty.
    """
    shares = [int(share) for share in ratio.split("/")]
    if sum(shares) != 100:
        raise ValueError(f"the shares of split_by (--split) must add up to 100, got {ratio}")
    if not (shares[0] and shares[1]):
        raise ValueError(f"the shares of split_by (--split) must be above 0 for train and val, got {ratio}")
    groups: dict[str, list[str]] = {}
    for name, group in _groups(names, group_by).items():
        groups.setdefault(group, []).append(name)
    ranked = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).hexdigest())
    wanted = {"val": shares[1], "test": shares[2] if len(shares) == 3 else 0}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for group in ranked:
        place = next(
            (split for split, share in wanted.items() if len(splits[split]) < round(share * len(names) / 100)), "train"
        )
        splits[place] += groups[group]
    empty = next((split for split, share in zip(("train", "val", "test"), shares) if share and not splits[split]), None)
    if empty is not None:
        raise ValueError(
            f"split_by (--split) must leave a frame for {empty}, got {ratio} of {len(names)} frames in "
            f"{len(groups)} groups"
        )
    assigned = {name: split for split, listed_names in splits.items() for name in listed_names}
    return {name: assigned[name] for name in names}


def check_groups(frames: Collection[tuple[str, str]], group_by: str) -> None:
    """Check that a split keeps groups together.

    Args:
        frames: frames with their splits.
        group_by: as in `draw_splits`.

    Raises:
        ValueError: a frame has no group, or a group is in two splits.
    """
    groups = _groups([frame for frame, _ in frames], group_by)
    first: dict[str, tuple[str, str]] = {}
    for frame, split in frames:
        other, other_split = first.setdefault(groups[frame], (frame, split))
        if other_split != split:
            raise ValueError(
                f"every group of group_by must be in one split, got {groups[frame]!r} in {other_split} and {split}, "
                f"with the frames {other!r} and {frame!r}"
            )


def choose_share(names: Sequence[str], share: float, *, seed: int = 0) -> set[str]:
    """Return the frames that make up a share of all, at least one, by the SHA-256 of the seed and their names.

    A larger share with the same seed holds a smaller one.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    return set(ranked[: max(1, round(share * len(names)))])


def assignment_text(assigned: Mapping[str, str]) -> str:
    """Return frame -> split as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("frame_id", "split"), *assigned.items()])
    return text.getvalue()


def _groups(names: Sequence[str], group_by: str | None) -> dict[str, str]:
    if group_by is None:
        return {name: name for name in names}
    if group_by.endswith(".csv"):
        if not Path(group_by).is_file():
            raise FileNotFoundError(
                f"group_by (--group-by) must be a regular expression or a CSV file, got {group_by!r}; there is no such "
                "file"
            )
        rows = read_table(Path(group_by), ("frame_id", "group"), title="the table of groups")
        table = {composed(row["frame_id"]): row["group"] for row in rows}
        found = {name: table.get(name) for name in names}
    else:
        try:
            matches = {name: re.search(group_by, name) for name in names}
        except re.error as error:
            raise ValueError(
                f"group_by must be a regular expression or a CSV file, got {group_by!r} ({error})"
            ) from error
        found = {name: match and match.group(1 if match.re.groups else 0) for name, match in matches.items()}
    missing = next((name for name, group in found.items() if not group), None)
    if missing is not None:
        raise ValueError(f"group_by must give every frame a group, got none for {missing!r} with {group_by}")
    return {name: group or "" for name, group in found.items()}
