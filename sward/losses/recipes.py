"""The two ways to set SWARD: as the paper writes it, and as this library recommends it.

The one place that defines both. The defaults of `MWADLoss`, `SWARDLoss` and `sward.config.SWARDConfig` are
`RECOMMENDED`; `sward train --recipe` and `sward.presets` take either by name.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

TeacherNormalization = Literal["none", "standardize"]
TeacherProjections = Literal["learned", "frozen"]
ContextReduction = Literal["sum", "mean"]
RecipeName = Literal["recommended", "paper"]


class Recipe(NamedTuple):
    """What the two ways set differently; the names are those of the fields of `sward.config.SWARDConfig`.

    Attributes:
        weights: beta of MWAD and gamma of PDR in Eq. 20.
        teacher_normalization: as in `MWADLoss`.
        teacher_projections: as in `MWADLoss`.
        context_reduction: as in `MWADLoss`.
        normalize: as in `PDRLoss`.
    """

    weights: tuple[float, float]
    teacher_normalization: TeacherNormalization
    teacher_projections: TeacherProjections
    context_reduction: ContextReduction
    normalize: bool


RECOMMENDED = Recipe(
    weights=(1.0, 0.0),
    teacher_normalization="standardize",
    teacher_projections="frozen",
    context_reduction="mean",
    normalize=True,
)
"""Standardised teacher features, frozen projections, no PDR. `normalize` counts where PDR is given a weight."""

PAPER = Recipe(
    weights=(2.0, 1.0),
    teacher_normalization="none",
    teacher_projections="learned",
    context_reduction="sum",
    normalize=False,
)
"""Eq. 1-20 and section 4.1 to the letter."""

RECIPES: dict[RecipeName, Recipe] = {"recommended": RECOMMENDED, "paper": PAPER}
