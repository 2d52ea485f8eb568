"""The losses of SWARD and of its peers, ready for any PyTorch trainer."""

from sward.losses.mwad import MWADLoss, MWADOutput
from sward.losses.objective import SegmentationCrossEntropy, SWARDDistillation, SWARDLoss, SWARDOutput
from sward.losses.pdr import PDRLoss, PDROutput
from sward.losses.protocol import LOGITS, DistillationInputs, DistillationLoss, DistillationOutput

__all__ = [
    "LOGITS",
    "DistillationInputs",
    "DistillationLoss",
    "DistillationOutput",
    "MWADLoss",
    "MWADOutput",
    "PDRLoss",
    "PDROutput",
    "SWARDDistillation",
    "SWARDLoss",
    "SWARDOutput",
    "SegmentationCrossEntropy",
]
