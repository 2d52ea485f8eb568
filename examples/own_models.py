"""Two networks of your own, MWAD on the layers you name, and the numbers it reports.

Any two modules will do, as long as the named layers return `[B, C, H, W]` maps; sizes and channels may differ.
"""

from itertools import pairwise

import torch
from torch import nn

from sward.features import FeatureTaps
from sward.losses import MWADLoss


def convolutions(*channels: int) -> nn.Sequential:
    """A toy network: each layer halves the resolution."""
    layers = [
        nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())
        for before, after in pairwise(channels)
    ]
    return nn.Sequential(*layers)


student, teacher = convolutions(3, 8, 16, 32), convolutions(3, 64, 128, 256, 512)
mwad = MWADLoss(student_channels=[16, 32], teacher_channels=[128, 512], window_size=[8, 4], embed_dim=32)

images = torch.randn(2, 3, 64, 96)
with FeatureTaps(student, ["1", "2"]) as student_taps, FeatureTaps(teacher, ["1", "3"], detach=True) as teacher_taps:
    student(images)
    teacher(images)
    output = mwad(list(student_taps.collect().values()), list(teacher_taps.collect().values()))

output.loss.backward()
print(f"attention {output.attention:.4f}  value {output.value:.4f}  context {output.context:.4f}")
first_weight = next(student.parameters())
assert first_weight.grad is not None
print("gradient at the student's first layer:", first_weight.grad.norm().item())
