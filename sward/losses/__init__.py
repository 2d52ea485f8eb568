"""The losses of SWARD and of other distillation methods, for any PyTorch trainer."""

from sward.losses.cirkd import CIRKDLoss
from sward.losses.classic import AttentionTransferLoss, CWDLoss, FitNetLoss, KDLoss, PairwiseLoss
from sward.losses.freekd import FreeKDLoss, FrequencyPrompts
from sward.losses.maskd import MasKDLoss, ReceptiveTokens
from sward.losses.masks import learn_masks, load_masks, save_masks
from sward.losses.mwad import MWADLoss, MWADOutput
from sward.losses.objective import SegmentationCrossEntropy, SWARDDistillation, SWARDLoss, SWARDOutput
from sward.losses.pdr import PDRLoss, PDROutput
from sward.losses.protocol import LOGITS, DistillationInputs, DistillationLoss, DistillationOutput
from sward.losses.recipes import PAPER, RECIPES, RECOMMENDED, Recipe
from sward.losses.standardized import StandardizedTeacher
from sward.losses.task import TaskLoss

__all__ = [
    "LOGITS",
    "PAPER",
    "RECIPES",
    "RECOMMENDED",
    "AttentionTransferLoss",
    "CIRKDLoss",
    "CWDLoss",
    "DistillationInputs",
    "DistillationLoss",
    "DistillationOutput",
    "FitNetLoss",
    "FreeKDLoss",
    "FrequencyPrompts",
    "KDLoss",
    "MWADLoss",
    "MWADOutput",
    "MasKDLoss",
    "PDRLoss",
    "PDROutput",
    "PairwiseLoss",
    "ReceptiveTokens",
    "Recipe",
    "SWARDDistillation",
    "SWARDLoss",
    "SWARDOutput",
    "SegmentationCrossEntropy",
    "StandardizedTeacher",
    "TaskLoss",
    "learn_masks",
    "load_masks",
    "save_masks",
]
