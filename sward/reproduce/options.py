"""Options of `sward reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sward import presets
from sward.config import Precision
from sward.reproduce.experiments import Scale

What = Literal[
    "table1",
    "table2",
    "table3",
    "table4",
    "methods",
    "questions",
    "peers",
    "length",
    "unlabelled",
    "masks",
    "figure1",
    "figure3",
    "figure4",
    "attention",
]

OWN_PRESETS = ("unlabelled", "masks")
"""Tables that have presets of their own, at one scale."""
DEFAULT_PRESET = "clinicdb-small"


@dataclass
class Options:
    """Run the experiments of a table or figure of the paper and create it.

    Finished runs are kept in the output folder and never repeated; interrupted ones resume from their last checkpoint.
    """

    what: Annotated[What, tyro.conf.Positional]
    """Table or figure of the paper, or methods (all of them), questions (choices that the paper leaves open), peers
    (each at the weight that validates best), length (twice the epochs), unlabelled (with images without masks), masks
    (with fewer masks), attention (picture of window attention)."""
    scale: Scale = "paper"
    """paper: exactly as in section 4.1; small: CVC-ClinicDB, CVC-ColonDB and CamVid at a size for two CPU cores."""
    seeds: int = 1
    """Number of runs per student, with seeds 0 to N-1. There is one teacher, with seed 0."""
    data: Path | None = None
    """Folder that holds the data sets; $SWARD_DATA or ./data by default."""
    checkpoints: Path = Path("checkpoints")
    """Folder that holds the teachers' pretrained trunks."""
    output: Path = Path("runs/reproduce")
    """Folder of the runs, tables and figures."""
    preset: str | None = None
    """Preset of methods, questions, peers, length and attention (clinicdb-small by default), or of a figure; not for
    other tables."""
    only: tuple[str, ...] = ()
    """Names of runs to train (none, sward, ...), with their teacher; all by default. The table shows finished runs."""
    iterations: int | None = None
    """Steps of every run, including teacher and masks, for a quick trial."""
    epochs: int | None = None
    """Epochs of the students' runs; does not change the teacher's."""
    precision: Precision | None = None
    """Precision of the students' runs, as of sward train; fp32 by default. Does not change the teacher's."""
    untrained_trunk: bool = False
    """Start the teacher from random weights instead of its pretrained trunk, for a quick trial."""
    image: int = 0
    """For figures of single images: index of the first image in the scored split, counted from its start again at its
    end; figure1 and attention take the first from there on that shows enough of the class."""
    target: str | None = None
    """For figure1 and attention: the class whose activation maps are shown, or on which the query lies; by default car
    or polyp, else the second class."""
    pixel: tuple[int, int] | None = None
    """For attention: row and column of the query pixel at the network's input size; by default in the middle of the
    class."""
    device: str | None = None
    """Device to run on; the GPU if there is one."""
    dry_run: bool = False
    """Print every run with its configuration and estimated cost, and exit."""

    def check(self) -> None:
        """Raise a `ValueError` for a preset that cannot be used, and for options that contradict each other."""
        if self.preset is not None:
            preset = presets.get(self.preset)
            if self.what.startswith("table") or self.what in OWN_PRESETS:
                raise ValueError(f"preset must be None for {self.what}, got {self.preset!r}; use methods instead")
            if preset.student.dataset.name == "folder":
                raise ValueError(
                    f"preset must be one that names its data set, got {self.preset!r}, which is for a folder of yours; "
                    "use sward train"
                )
        if self.iterations is not None and self.epochs is not None:
            raise ValueError(f"only one of iterations and epochs may be set, got {self.iterations} and {self.epochs}")
        for name, given, readers in (
            ("pixel", self.pixel is not None, ("attention",)),
            ("target", self.target is not None, ("figure1", "attention")),
            ("image", self.image != 0, ("figure1", "figure3", "attention")),
        ):
            if given and self.what not in readers:
                raise ValueError(f"{name} must be left out for {self.what}; it belongs to {', '.join(readers)}")
        if self.image < 0:
            raise ValueError(f"image must be at least 0, got {self.image}")
        for name in ("seeds", "iterations", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
