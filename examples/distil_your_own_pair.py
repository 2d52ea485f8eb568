"""Distil your own pair in 15 minutes: your images, your two networks, your training loop.

    python examples/distil_your_own_pair.py
    python examples/distil_your_own_pair.py --data FOLDER --classes background,polyp --mask-values 0,255

Without --data it generates scenes, so that the script runs anywhere. Needs `pip install -e ".[models]"`.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward import Distiller, data, models
from sward.data import FolderOptions, SegmentationDataset
from sward.evaluation import evaluate
from sward.training.batches import batches

SIZE = (64, 64)


# 1. The student: any network that maps images [B, 3, H, W] to logits [B, classes, h, w].
class SmallUNet(nn.Module):
    """Four strided convolutions down, four sums up."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(_block(a, b, stride=2) for a, b in zip((3, *widths), widths))
        self.decoder = nn.ModuleList(_block(a, b) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = [images]
        for block in self.encoder:
            maps.append(block(maps[-1]))
        result = maps.pop()
        for block in self.decoder:
            skip = maps.pop()
            result = skip + F.interpolate(block(result), size=skip.shape[-2:], mode="bilinear")
        return self.classifier(result)


def _block(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())


# 2. The images: a folder of images and masks, or generated scenes. The teacher may learn from more.
def images_of(options: argparse.Namespace) -> dict[str, SegmentationDataset]:
    """Return the images for the student, for the teacher, without labels, and for testing."""
    if options.data is None:
        return {
            "labelled": data.build("scenes", "train", train=True, image_size=SIZE, count=24),
            "teacher": data.build("scenes", "train", train=True, image_size=SIZE, count=2**20, series=1),
            "unlabelled": data.build("scenes", "train", train=True, image_size=SIZE, count=512, series=2),
            "test": data.build("scenes", "test", train=False, image_size=SIZE),
        }
    folder = {
        "root": options.data,
        "image_size": SIZE,
        "split_by": options.split or None,
        "folder_options": FolderOptions(
            options.classes.split(","), [value for value in options.mask_values.split(",") if value]
        ),
    }
    train = data.build("folder", "train", train=True, **folder)
    test = data.build("folder", "test", train=False, **folder)
    # Put images of your own without labels in place of "unlabelled".
    return {"labelled": train, "teacher": train, "unlabelled": train, "test": test}


# 3. The teacher. Yours is pretrained; this one learns here, from other scenes than its student.
def trained(network: nn.Module, images: SegmentationDataset, steps: int) -> nn.Module:
    """Train a network on the labels alone."""
    optimizer, schedule = _optimizer(network, steps)
    for _, batch in zip(range(steps), batches(images, 8, seed=0)):
        logits = F.interpolate(network(batch.images), size=batch.labels.shape[-2:], mode="bilinear")
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.labels, ignore_index=255).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


# 4. Distil. Images without labels come along as rows whose labels are all 255.
def distilled(student: nn.Module, teacher: nn.Module, images: dict[str, SegmentationDataset], steps: int) -> nn.Module:
    """Train the student on the labels and on what the teacher computes."""
    distiller = Distiller(
        student,
        teacher,
        num_classes=images["labelled"].info.num_classes,
        image_size=SIZE,
        window_size=(8, 8, 4, 2),  # windows no larger than the maps, 16 to 2 pixels per side at this image size
        embed_dim=32,
    )
    print("student layers:", *distiller.student_layers)
    print("teacher layers:", *distiller.teacher_layers)
    optimizer, schedule = _optimizer(distiller, steps)
    streams = batches(images["labelled"], 8, seed=0), batches(images["unlabelled"], 8, seed=1)
    for _, labelled, more in zip(range(steps), *streams):
        pictures = torch.cat([labelled.images, more.images])
        labels = torch.cat([labelled.labels, torch.full_like(more.labels, 255)])
        optimizer.zero_grad()
        distiller(pictures, labels).backward()
        optimizer.step()
        schedule.step()
    return distiller.student.eval()


def _optimizer(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1)


def main(words: list[str] | None = None) -> dict[str, float]:
    """Train teacher, student alone and distilled student; return their test mIoU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images and masks, see docs/own_data.md")
    parser.add_argument("--classes", default="background,foreground")
    parser.add_argument("--mask-values", default="0,255", help="empty for masks of class indices")
    parser.add_argument("--split", default="80/10/10", help="empty for a folder that has its splits")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--output", default="student.pt")
    options = parser.parse_args(words)
    images = images_of(options)
    num_classes = images["test"].info.num_classes

    torch.manual_seed(0)
    teacher = trained(models.build("hiera_demo", num_classes), images["teacher"], options.teacher_steps)
    torch.manual_seed(0)
    alone = trained(SmallUNet(num_classes), images["labelled"], options.steps)
    torch.manual_seed(0)
    student = distilled(SmallUNet(num_classes), teacher, images, options.steps)

    # 5. Score all three on images that nobody has seen, and keep the student.
    networks = {"teacher": teacher, "student alone": alone, "student + SWARD": student}
    scores = {name: evaluate(network, images["test"]).mean_iou for name, network in networks.items()}
    for name, score in scores.items():
        print(f"{name}: {100 * score:.1f} % mIoU")
    torch.save(student.state_dict(), options.output)
    print(f"written: {options.output}")
    return scores


if __name__ == "__main__":
    main()
