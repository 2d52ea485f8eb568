"""What `sward reproduce` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sward import presets
from sward.reproduce.experiments import Scale

What = Literal[
    "table1",
    "table2",
    "table3",
    "table4",
    "methods",
    "questions",
    "figure1",
    "figure3",
    "figure4",
    "attention",
]

DEFAULT_PRESET = "clinicdb-small"


@dataclass
class Options:
    """Run the experiments behind a table or figure of the paper and make it.

    Finished runs are kept in the output folder and never repeated; an interrupted one goes on where it was saved last.
    """

    what: Annotated[What, tyro.conf.Positional]
    """Tables and figures of the paper; methods: all distillation methods in one equal run each;
    questions: what the paper leaves open; attention: windows of teacher and student side by side."""
    scale: Scale = "paper"
    """paper: section 4.1 exactly; small: CVC-ClinicDB and CamVid at a size that two cores train."""
    seeds: int = 1
    """Runs of each student, with the seeds 0 to N-1. There is one teacher, with seed 0."""
    data: Path | None = None
    """Folder that holds the data sets; $SWARD_DATA or ./data by default."""
    checkpoints: Path = Path("checkpoints")
    """Folder that holds the teachers' pretrained trunks."""
    output: Path = Path("runs/reproduce")
    """Folder of the runs, tables and figures."""
    preset: str | None = None
    """Pair and data set of methods, questions and attention (clinicdb-small by default), or of a figure instead of its
    own. Tables 1 to 4 have theirs."""
    only: tuple[str, ...] = ()
    """Names of runs to train (none, sward, sward-mwad, ...), with the teacher they need; all by default.
    The table shows whatever is finished."""
    iterations: int | None = None
    """Steps of every run, of the teacher and of masks too, for a quick trial."""
    epochs: int | None = None
    """Epochs of the students' runs; the teacher keeps its own."""
    untrained_trunk: bool = False
    """Start the teacher from random weights where its pretrained trunk is not at hand, for a quick trial."""
    image: int = 0
    """For figures of single images: index of the first one in the split that is scored."""
    target: str | None = None
    """For figure1: class that the maps are of; car or polyp by default."""
    pixel: tuple[int, int] | None = None
    """For attention: row and column of the query pixel at the network's input size; the centre by default."""
    device: str | None = None
    """Where to run; the GPU where there is one."""
    dry_run: bool = False
    """Print every run with its configuration and an estimate of its cost, and do nothing."""

    def check(self) -> None:
        """Raises a `ValueError` for a preset that does not exist and for options that contradict each other."""
        if self.preset is not None:
            presets.get(self.preset)
            if self.what.startswith("table"):
                raise ValueError(f"preset: {self.what} has its own pairs; methods shows every method on {self.preset}")
        if self.iterations is not None and self.epochs is not None:
            raise ValueError("give --iterations or --epochs, not both")
        for name in ("seeds", "iterations", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
