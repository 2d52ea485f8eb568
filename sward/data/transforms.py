"""Training and evaluation transforms, on torchvision.transforms.v2 with tv_tensors.

Every transform maps `(image [3, H, W] uint8, labels [H, W] uint8)` to `(image float32, labels int64)`; the image
comes out in [0, 1], RGB, minus ImageNet's mean, over ImageNet's standard deviation, which is what SAM 2, timm and
torchvision weights expect. Randomness is drawn from torch's global CPU generator, which `SegmentationDataset` seeds
for every sample.

Training labels follow the image through every geometric step (nearest neighbour, 255 where the image was filled).
Evaluation labels are left at the resolution of their file: only the image is resized, and the evaluator resizes
the logits to the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sward.data.sample import IGNORE_INDEX

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_FILL = 0


def normalise(image: Tensor) -> Tensor:
    """`[..., 3, H, W]` uint8 to contiguous float32 with ImageNet's statistics."""
    result = torch.empty(image.shape, device=image.device)
    # One channel at a time and in place: a third of the time, as a channel stays in the cache. Decoded images have
    # their channels innermost; to part them here costs less than to stack such images into a batch.
    for channel, (mean, std) in enumerate(zip(*_STATISTICS)):
        plane = result[..., channel, :, :]
        plane.copy_(image[..., channel, :, :]).div_(255).sub_(mean).div_(std)
    return result


def denormalise(image: Tensor) -> Tensor:
    """Inverse of `normalise`: `[..., 3, H, W]` float to uint8, for figures."""
    mean, std = (image.new_tensor(values)[:, None, None] for values in _STATISTICS)
    return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


_STATISTICS = (IMAGENET_MEAN, IMAGENET_STD)


class EvaluationTransform:
    """Resizes the image (bilinear, antialiased) and normalises it; labels keep their own resolution.

    Args:
        size: `(height, width)` of the network's input; None keeps the image's size.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self.size = size

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return normalise(resize_image(image, self.size) if self.size else image), labels.long()


class TrainingTransform:
    """Applies joint steps of torchvision.transforms.v2 to image and labels, then normalises.

    Args:
        steps: transforms that take and return `(tv_tensors.Image, tv_tensors.Mask)`.
        resized: size -> the same transform with another size of its result, drawing the same numbers from the same
            random state. None if there is no such thing.
    """

    def __init__(
        self,
        steps: Sequence[Callable[..., Any]],
        resized: Callable[[tuple[int, int]], TrainingTransform] | None = None,
    ) -> None:
        self.steps = tuple(steps)
        self.resized = resized

    def at(self, size: tuple[int, int]) -> TrainingTransform:
        """The transform that gives the same view at another size, from the same random state.

        Raises:
            ValueError: if it was made without `resized`.
        """
        if self.resized is None:
            raise ValueError(f"resized must be given for a transform with views of another size, got None for {size}")
        return self.resized(size)

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        tv_tensors = _torchvision().tv_tensors
        pair = tv_tensors.Image(image), tv_tensors.Mask(labels)
        for step in self.steps:
            pair = step(*pair)
        return normalise(pair[0].as_subclass(Tensor)), pair[1].as_subclass(Tensor).long()


class ScaleCrop:
    """Random scale, then a random crop of fixed size: the paper's "dynamically cropped to 512x1024".

    Draws a scale, cuts the window that would fill the crop at this scale, and resizes only that window. It is the
    usual resize-then-crop without resizing what the crop throws away. Where the scaled image is smaller than the
    crop it is padded at a random offset: image 0, labels 255.

    Args:
        size: `(height, width)` of the crop.
        scales: least and greatest scale; the logarithm of the scale is uniform.
    """

    def __init__(
        self, size: tuple[int, int], scales: tuple[float, float], output: tuple[int, int] | None = None
    ) -> None:
        self.size = size
        self.scales = scales
        self.output = output or size

    def __call__(self, image: Any, labels: Any) -> tuple[Any, Any]:
        torchvision = _torchvision()
        functional = torchvision.transforms.v2.functional
        low, high = torch.tensor(self.scales, dtype=torch.float64).log().tolist()
        scale = torch.empty((), dtype=torch.float64).uniform_(low, high).exp().item()
        height, width = (max(1, round(side / scale)) for side in self.size)
        missing = [max(0, side - present) for side, present in zip((height, width), image.shape[1:], strict=True)]
        if any(missing):
            top, left = (int(torch.randint(0, rows + 1, ())) for rows in missing)
            padding = [left, top, missing[1] - left, missing[0] - top]
            image = functional.pad(image, padding, fill=IMAGE_FILL)
            labels = functional.pad(labels, padding, fill=IGNORE_INDEX)
        top, left = (
            int(torch.randint(0, present - side + 1, ()))
            for side, present in zip((height, width), image.shape[1:], strict=True)
        )
        window = top, left, height, width
        resized = functional.resized_crop(image, *window, size=list(self.output), antialias=True)
        return resized, functional.resized_crop(labels, *window, size=list(self.output))


def street_training(
    crop: tuple[int, int],
    *,
    resize_first: bool = False,
    scales: tuple[float, float] = (0.5, 2.0),
    output: tuple[int, int] | None = None,
) -> TrainingTransform:
    """Random scale, crop and horizontal flip. `resize_first`: scales are relative to an image resized to `crop`."""
    v2 = _torchvision().transforms.v2
    steps: list[Callable[..., Any]] = [v2.Resize(crop, antialias=True)] if resize_first else []
    return TrainingTransform(
        [*steps, ScaleCrop(crop, scales, output), v2.RandomHorizontalFlip()],
        resized=lambda size: street_training(crop, resize_first=resize_first, scales=scales, output=size),
    )


def polyp_training(size: tuple[int, int]) -> TrainingTransform:
    """Resize, flips both ways, rotation within 30 degrees, mild colour jitter. An endoscope has no up and no down."""
    v2, tv_tensors = _torchvision().transforms.v2, _torchvision().tv_tensors
    return TrainingTransform(
        [
            v2.Resize(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomRotation(
                30,
                interpolation=v2.InterpolationMode.BILINEAR,
                fill={tv_tensors.Image: IMAGE_FILL, tv_tensors.Mask: IGNORE_INDEX},
            ),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
        ],
        resized=polyp_training,
    )


def flip_training(size: tuple[int, int] | None = None) -> TrainingTransform:
    """Flips both ways and nothing else, for data without a preferred direction and without end; resized to `size`."""
    v2 = _torchvision().transforms.v2
    resize = [] if size is None else [v2.Resize(size, antialias=True)]
    return TrainingTransform([*resize, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()], resized=flip_training)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`[3, H, W]` uint8 to `[3, *size]` uint8: bilinear with antialiasing, what `v2.Resize` does to an image."""
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def parse_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """`512` or `(height, width)` to `(height, width)`.

    Raises:
        ValueError: not one or two positive whole numbers.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size must be a positive number or (height, width), got {image_size!r}")
    return size


def _torchvision() -> Any:
    """torchvision, imported at the first transform that needs it: it costs a second that `import sward` must not."""
    try:
        import torchvision
        import torchvision.transforms.v2
        from torchvision import tv_tensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "training transforms need torchvision, which is not installed: pip install 'sward[models]'"
        ) from error
    return torchvision
