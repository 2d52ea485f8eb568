"""SWARD in a training loop of your own: plain PyTorch, two networks from elsewhere, features caught by taps."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sward.features import FeatureTaps
from sward.losses import MWADLoss, SegmentationCrossEntropy, SWARDLoss


def distil(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    steps: int = 100,
) -> None:
    """Train `student` against `teacher`; the layers are names from `named_modules()`, shallow to deep."""
    images, _ = next(iter(loader))
    with FeatureTaps(student, student_layers) as taps, FeatureTaps(teacher.eval(), teacher_layers, detach=True) as seen:
        with torch.no_grad():  # One batch shows how many channels each layer has.
            student(images), teacher(images)
        mwad = MWADLoss([f.shape[1] for f in taps.collect().values()], [f.shape[1] for f in seen.collect().values()])
        objective = SWARDLoss(SegmentationCrossEntropy(), mwad)
        optimizer = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=1e-3)
        step = 0
        while step < steps:
            for images, labels in loader:
                with torch.no_grad():
                    teacher(images)
                logits = student(images)
                output = objective(logits, labels, [*taps.collect().values()], [*seen.collect().values()])
                optimizer.zero_grad(set_to_none=True)
                output.loss.backward()
                optimizer.step()
                step += 1
                print(step, {name: round(term.item(), 4) for name, term in output.terms.items()})
                if step == steps:
                    break


if __name__ == "__main__":
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large  # any network will do

    class Logits(nn.Module):
        """torchvision's segmentation networks return a dictionary; a loss takes the logits."""

        def __init__(self) -> None:
            super().__init__()
            self.network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images)["out"]

    batches = [(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))) for _ in range(2)]
    layers = ["network.backbone.3", "network.backbone.6"]
    distil(Logits(), Logits(), batches, layers, layers, steps=4)
