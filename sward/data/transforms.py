"""Training and evaluation transforms, on torchvision.transforms.v2 with tv_tensors.

Every transform maps `(image [3, H, W] uint8, labels [H, W] uint8)` to `(image float32, labels int64)`; the image
comes out in [0, 1], RGB, minus ImageNet's mean, over ImageNet's standard deviation. SAM 2, DINOv2 and torchvision
weights expect that; many of timm and transformers expect other statistics, and their networks renormalise what they
get, see `sward.models.inputs.Renormalising`. Randomness is drawn from torch's global CPU generator, which
`SegmentationDataset` seeds for every sample.

A training transform computes its geometry first and samples image and labels once each from the decoded picture: the
image with antialiasing, every label where the centre of its pixel lies, 255 where the image was filled.
Evaluation labels are left at the resolution of their file: only the image is resized, and the evaluator resizes
the logits to the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sward.alignment import resize_labels
from sward.data.sample import IGNORE_INDEX
from sward_kernels.colours import native as colours

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
        pair = _wrapped(image, labels)
        for step in self.steps:
            pair = step(*pair)
        return normalise(pair[0].as_subclass(Tensor)), pair[1].as_subclass(Tensor).long()


class ScaleCrop:
    """Random scale, then a random crop of fixed size: the paper's "dynamically cropped to 512x1024".

    Draws a scale, cuts the window that fills the crop at this scale, and resizes only that window. It is the usual
    resize-then-crop without resizing what the crop throws away. Where the scaled image is smaller than the crop it is
    padded at a random offset: image 0, labels 255.

    Args:
        size: `(height, width)` of the crop.
        scales: least and greatest scale; the logarithm of the scale is uniform.
        relative: scale 1 is the image resized to `size`, not the image as it is.
        output: `(height, width)` of the result: the same crop, sampled at this size. Default: `size`.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scales: tuple[float, float],
        *,
        relative: bool = False,
        output: tuple[int, int] | None = None,
    ) -> None:
        self.size = size
        self.scales = scales
        self.relative = relative
        self.output = output or size

    def __call__(self, image: Any, labels: Any) -> tuple[Any, Any]:
        low, high = torch.tensor(self.scales, dtype=torch.float64).log().tolist()
        scale = torch.empty((), dtype=torch.float64).uniform_(low, high).exp().item()
        rows, columns = (
            _Span.draw(present, side, scale * side / present if self.relative else scale).stretched(sampled / side)
            for present, side, sampled in zip(image.shape[1:], self.size, self.output, strict=True)
        )
        window = (..., rows.window, columns.window)
        size = rows.length, columns.length
        resized = resize_image(image.as_subclass(Tensor)[window], size)
        moved = resize_labels(labels.as_subclass(Tensor)[window][None], size)[0]
        if size != self.output:
            padding = [*columns.margins(self.output[1]), *rows.margins(self.output[0])]
            resized = F.pad(resized, padding, value=IMAGE_FILL)
            moved = F.pad(moved, padding, value=IGNORE_INDEX)
        return _wrapped(resized, moved)


class _Span(NamedTuple):
    """One axis of a crop: the source pixels `window` fill `length` pixels of the crop from `start` on."""

    window: slice
    start: int
    length: int

    @classmethod
    def draw(cls, present: int, side: int, scale: float) -> _Span:
        """A random window that fills `side` pixels at `scale`, or all of `present` at a random offset if it is less."""
        if present * scale > side:
            taken = max(1, round(side / scale))
            first = int(torch.randint(0, present - taken + 1, ()))
            return cls(slice(first, first + taken), 0, side)
        length = min(side, max(1, round(present * scale)))
        return cls(slice(0, present), int(torch.randint(0, side - length + 1, ())), length)

    def stretched(self, factor: float) -> _Span:
        """The same window in a crop of `factor` times the pixels."""
        start, end = (round(factor * place) for place in (self.start, self.start + self.length))
        return self._replace(start=start, length=max(1, end - start))

    def margins(self, side: int) -> tuple[int, int]:
        return self.start, side - self.start - self.length


class Resize:
    """Resizes to a fixed size: the image with antialiasing, every label where the centre of its pixel lies.

    `v2.Resize` takes the label of the pixel's corner instead.

    Args:
        size: `(height, width)` of the result.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any, labels: Any) -> tuple[Any, Any]:
        moved = resize_labels(labels.as_subclass(Tensor)[None], self.size)[0]
        return _wrapped(resize_image(image.as_subclass(Tensor), self.size), moved)


class FlipRotateResize:
    """Random flips both ways, a random rotation about the centre and a resize to a fixed size, as one affine map.

    What the rotation uncovers is image 0, labels 255.

    Args:
        size: `(height, width)` of the result.
        degrees: greatest angle either way; the angle is uniform.
    """

    def __init__(self, size: tuple[int, int], degrees: float) -> None:
        self.size = size
        self.degrees = degrees

    def __call__(self, image: Any, labels: Any) -> tuple[Any, Any]:
        across, down = (1 - 2 * (torch.rand(2) < 0.5).long()).tolist()
        angle = math.radians(torch.empty(()).uniform_(-self.degrees, self.degrees).item())
        height, width = self.size
        sine, cosine = math.sin(angle), math.cos(angle)
        # From the result to the source, in coordinates from -1 to 1 over the whole picture: no resize changes these.
        to_source = torch.tensor(
            [
                [across * cosine, -across * sine * height / width, 0.0],
                [down * sine * width / height, down * cosine, 0.0],
            ]
        )
        places = F.affine_grid(to_source[None], [1, 1, height, width], align_corners=False)
        smoothed = _smoothed(image.as_subclass(Tensor), self.size).float()
        rotated = F.grid_sample(smoothed[None], places, mode="bilinear", align_corners=False)[0]
        # grid_sample puts 0 outside the picture, so the label of outside is made 0 meanwhile.
        shifted = labels.as_subclass(Tensor)[None, None].float() - IGNORE_INDEX
        moved = F.grid_sample(shifted, places, mode="nearest", align_corners=False)[0, 0] + IGNORE_INDEX
        return _wrapped(rotated.round_().to(torch.uint8), moved.to(torch.uint8))


class ColourJitter:
    """`v2.ColorJitter`, in C++ where that compiles; the image is the same bit for bit.

    Args:
        limits: of brightness, contrast, saturation and hue, as `v2.ColorJitter` takes them.
    """

    def __init__(self, **limits: float) -> None:
        self.reference = _torchvision().transforms.v2.ColorJitter(**limits)

    def __call__(self, image: Any, labels: Any) -> tuple[Any, Any]:
        plain = image.as_subclass(Tensor)
        if not colours.serves(plain):
            jittered: tuple[Any, Any] = self.reference(image, labels)
            return jittered
        drawn = self.reference.make_params([image])
        changes = (
            (colours.adjust_brightness_, drawn["brightness_factor"]),
            (colours.adjust_contrast_, drawn["contrast_factor"]),
            (colours.adjust_saturation_, drawn["saturation_factor"]),
            (colours.adjust_hue_, drawn["hue_factor"]),
        )
        plain = plain.clone()
        for index in drawn["fn_idx"].tolist():
            change, factor = changes[index]
            if factor is not None:
                change(plain, factor)
        return _wrapped(plain, labels.as_subclass(Tensor))


def _smoothed(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The image without what a bilinear sample at `size` would alias.

    It is resized to sqrt(2) times `size` where it is larger: the variances of this filter and of the bilinear
    sample add up to that of `resize_image`, so training images are as sharp as those of evaluation.
    """
    height, width = (
        min(present, round(math.sqrt(2) * side)) for present, side in zip(image.shape[1:], size, strict=True)
    )
    return resize_image(image, (height, width))


def street_training(
    crop: tuple[int, int], output: tuple[int, int] | None = None, *, resize_first: bool = False
) -> TrainingTransform:
    """Random scale of 0.5 to 2, crop and horizontal flip. `resize_first`: relative to an image resized to `crop`."""
    v2 = _torchvision().transforms.v2
    return TrainingTransform(
        [ScaleCrop(crop, (0.5, 2.0), relative=resize_first, output=output), v2.RandomHorizontalFlip()],
        # Loader processes that are spawned need something that can be pickled.
        resized=partial(street_training, crop, resize_first=resize_first),
    )


def polyp_training(size: tuple[int, int]) -> TrainingTransform:
    """Flips both ways, rotation within 30 degrees, mild colour jitter. An endoscope has no up and no down."""
    jitter = ColourJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02)
    return TrainingTransform([FlipRotateResize(size, 30), jitter], resized=polyp_training)


def flip_training(size: tuple[int, int] | None = None) -> TrainingTransform:
    """Flips both ways and nothing else, for data without a preferred direction and without end; resized to `size`."""
    v2 = _torchvision().transforms.v2
    # A size comes from `TrainingTransform.at`, for a teacher that sees the view at its own size.
    resize = [] if size is None else [Resize(size)]
    return TrainingTransform([*resize, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()], resized=flip_training)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `[3, H, W]` uint8 to `[3, *size]` uint8, bilinear with antialiasing, as `v2.Resize` does to an image."""
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


def _wrapped(image: Tensor, labels: Tensor) -> tuple[Any, Any]:
    tv_tensors = _torchvision().tv_tensors
    return tv_tensors.Image(image), tv_tensors.Mask(labels)


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
