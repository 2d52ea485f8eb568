"""Whether the teacher's learned projections still say something: the measures behind an open question of the paper.

Both projections of MWAD learn (Eq. 8), so they can agree by becoming constant: then `value` and `context` are zero and
teach nothing. A collapse shows as an effective rank near 1, vectors that all point the same way, or a vanishing norm.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sward.features import FeatureTaps
from sward.losses import SWARDDistillation
from sward.runs import build_split, load_distillation

IMAGES = 16
TOKENS = 2048


@dataclass(frozen=True)
class Collapse:
    """Health of the teacher's projected values V_t on validation images, mean over stages.

    Attributes:
        effective_rank: exp of the entropy of the normalised singular values of V_t, not centred (Roy and Vetterli,
            2007): 1 if all rows are parallel, at most the width of V.
        mean_cosine: mean |cos| between V_t of different pixels; 1 if all point the same way.
        norm: root mean square length of V_t.
        attention: Eq. 11 without shift, mean over stages.
    """

    effective_rank: float
    mean_cosine: float
    norm: float
    attention: float

    @classmethod
    def of_run(cls, path: Path, root: Path | None = None) -> Collapse | None:
        """Measured once for a run and kept in its folder; None for a run without MWAD.

        Args:
            path: run folder.
            root: folder that holds its data set; None takes the run's own.
        """
        kept = path / "collapse.json"
        if kept.exists():
            return cls(**json.loads(kept.read_text(encoding="utf-8")))
        pair = load_distillation(path)
        if pair is None or not isinstance(pair.loss, SWARDDistillation) or not pair.loss.weights[0]:
            return None
        pair.config.dataset.root = root or pair.config.dataset.root
        dataset = build_split(pair.config, "val", train=False)
        images = torch.stack([dataset[index].image for index in range(min(IMAGES, len(dataset)))])
        measured = _measure(pair.student, pair.teacher, pair.loss, images)
        kept.write_text(json.dumps(asdict(measured), indent=2) + "\n", encoding="utf-8")
        return measured


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the singular values of `vectors [n, d]`, normalised to sum 1; not centred."""
    values = torch.linalg.svdvals(vectors.double())
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def mean_cosine(vectors: Tensor) -> float:
    """Mean |cos| over all pairs of different rows of `vectors [n, d]`, n at least 2."""
    unit = F.normalize(vectors.double(), dim=1)
    count = len(unit)
    return float(((unit @ unit.T).abs().sum() - (unit * unit).sum()) / (count * (count - 1)))


@torch.no_grad()
def _measure(student: torch.nn.Module, teacher: torch.nn.Module, loss: SWARDDistillation, images: Tensor) -> Collapse:
    with FeatureTaps(student, loss.stage_taps) as own, FeatureTaps(teacher, loss.teacher_taps) as other:
        student(images)
        teacher(images)
        student_maps, teacher_maps = own.collect(), other.collect()
    ranks, cosines, norms = [], [], []
    for index, (own_tap, other_tap) in enumerate(zip(loss.stage_taps, loss.teacher_taps, strict=True)):
        projected, _ = loss.mwad.project(index, student_maps[own_tap], teacher_maps[other_tap])
        values = projected.chunk(3, dim=1)[2].permute(0, 2, 3, 1).flatten(0, 2)
        # Evenly spaced rows: which pixels are looked at does not depend on chance.
        values = values[:: max(1, len(values) // TOKENS)]
        ranks.append(effective_rank(values))
        cosines.append(mean_cosine(values))
        norms.append(float(values.double().square().sum(1).mean().sqrt()))
    relations = loss.mwad.eval()(
        [student_maps[tap] for tap in loss.stage_taps], [teacher_maps[tap] for tap in loss.teacher_taps]
    )
    stages = len(ranks)
    return Collapse(sum(ranks) / stages, sum(cosines) / stages, sum(norms) / stages, float(relations.attention))
