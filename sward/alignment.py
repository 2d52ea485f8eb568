"""Bringing a teacher's and a student's feature maps onto common ground (Eq. 1-3).

Every loss that compares two networks aligns them here: `phi` is a learnable 1x1 convolution between channel
counts, `psi` a bilinear resize to the smaller of the two grids. Both are linear and the resize weights of a
pixel sum to one, so they commute, bias included; `ChannelProjection.project_and_resize` uses the cheaper order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward_kernels.standardization import channel_moments, standardize


def aligned_size(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The common grid of two `[B, C, H, W]` maps: `(min H, min W)` (Eq. 3)."""
    return min(first.shape[-2], second.shape[-2]), min(first.shape[-1], second.shape[-1])


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of `[B, C, H, W]` features to `size`, without corner alignment or antialiasing (psi, Eq. 2).

    A map that already has that size is returned itself, not copied.
    """
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def resize_to_common(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Resizes both maps to their common grid (psi, Eq. 2-3)."""
    size = aligned_size(first, second)
    return resize(first, size), resize(second, size)


def resize_labels(labels: Tensor, size: tuple[int, int], *, pick: Literal["centre", "corner"] = "centre") -> Tensor:
    """Resize `[B, H, W]` integer labels to `size` without mixing them; dtype and values are kept.

    Each target pixel is a cell of the source grid and takes the label at the cell's centre, where `resize` samples
    features. A centre between two pixels takes the one before and the one after in turn, so that labels do not drift.
    The index is computed in integers, so it is exact. Labels that already have that size are returned themselves.

    Args:
        labels: `[B, H, W]`.
        size: target height and width.
        pick: "corner" takes each cell's upper left pixel instead, `floor(i * source / target)`, as
            `F.interpolate(mode="nearest")` does. Such labels lie up to half a target pixel low and right of the
            image; official distillation code has them.

    Raises:
        ValueError: if `labels` is not `[B, H, W]`.
    """
    if labels.dim() != 3:
        raise ValueError(f"labels must be [B, H, W], got shape {tuple(labels.shape)}")
    if tuple(labels.shape[-2:]) == tuple(size):
        return labels
    index = _centre_index if pick == "centre" else _corner_index
    rows = index(labels.shape[-2], size[0], labels.device)
    columns = index(labels.shape[-1], size[1], labels.device)
    # A third of the time of indexing with both at once.
    return labels.index_select(1, rows).gather(2, columns.expand(len(labels), size[0], -1))


def _centre_index(source: int, target: int, device: torch.device) -> Tensor:
    cells = torch.arange(target, device=device)
    centres = (2 * cells + 1) * source
    between = centres % (2 * target) == 0
    return centres // (2 * target) - (between & (cells % 2 == 0)).long()


def _corner_index(source: int, target: int, device: torch.device) -> Tensor:
    return torch.arange(target, device=device) * source // target


def project(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of `[B, C, H, W]` features with `weight [out, C]`, in their memory layout.

    Features of any floating dtype are computed in the weight's, or in autocast's where it is on.

    On a CPU as products of matrices, which on two cores take three quarters of a convolution's time, forward and
    backward. Not on a GPU: there torch gives fp32 convolutions TF32 and products not.
    """
    features = in_dtype_of(weight, features)
    if not features.is_cpu:
        return F.conv2d(features, weight[:, :, None, None], bias)
    if features.stride(1) == 1:
        return F.linear(features.movedim(1, 3), weight, bias).movedim(3, 1)
    pixels, matrices = features.flatten(2), weight.expand(len(features), -1, -1)
    products = matrices @ pixels if bias is None else torch.baddbmm(bias[:, None], matrices, pixels)
    return products.unflatten(2, features.shape[2:])


def in_dtype_of(weight: Tensor, features: Tensor) -> Tensor:
    """Features in the dtype of the weight that multiplies them; under autocast, which sees to that, as they are."""
    if features.dtype == torch.float64 or not torch.is_autocast_enabled(features.device.type):  # it skips float64
        return features.to(weight.dtype)
    return features


class ChannelProjection(nn.Conv2d):
    """A learnable 1x1 convolution from `in_channels` to `out_channels`: `phi` of Eq. 1, or one of Eq. 8's `Theta`.

    Args:
        in_channels: channels of the map it reads.
        out_channels: channels of the map it returns.
        bias: whether it adds a bias. `phi` has one, `Theta` has none.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` -> `[B, out_channels, H, W]`, in the memory layout of the features."""
        return project(features, self.weight.flatten(1), self.bias)

    def project_and_resize(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """`psi(phi(features))` on the grid `size`, in whichever order touches fewer pixels; the result is the same."""
        if size[0] * size[1] <= features.shape[-2] * features.shape[-1]:
            return self(resize(features, size))
        return resize(self(features), size)


class Standardization(nn.Module):
    """Gives every channel of a teacher's map mean 0 and variance 1.

    Channels of transformer features differ in scale by one to two orders of magnitude, and much of their energy is one
    constant vector, so that a random projection sees little else. Standardising each channel removes both; known from
    multi-teacher distillation (Ranzinger et al., "PHI-S", 2024, and "AM-RADIO", CVPR 2024).

    A batch norm without affine parameters, but for its statistics: they are the exact mean and variance over all
    positions of all maps that came in training mode so far, the present one included, and both modes normalise with
    them. The first batch is normalised by its own statistics. A teacher is frozen, so later ones converge to those of
    the data set, and neither a small batch nor a change of mode moves the target that the student learns.

    Args:
        channels: channels of the map.
        process_group: processes over whose maps the statistics are taken; they are the same on all of them. Default:
            this process alone.

    Shapes:
        `[B, channels, H, W]`, floating -> the same shape in float32, or float64 where the map is. 16-bit maps are
        computed in float32. A channel that is constant up to rounding gives zeros. Before the first map in training
        mode the map is returned as it is.

    Examples:
        >>> import torch
        >>> from sward.alignment import Standardization
        >>> standardize = Standardization(channels=1)
        >>> standardize(torch.tensor([[[[1.0, 3.0]]]])).flatten()
        tensor([-1.,  1.])
        >>> standardize.eval()(torch.tensor([[[[5.0]]]])).flatten()  # mean 2, standard deviation 1 so far
        tensor([3.])

    Attributes:
        count: int64, positions seen so far. Maps that are not finite do not count: the step that they spoil may be
            skipped, as a loss scaler does, and must not spoil those after it.
        mean: `[channels]`, of all positions.
        variance: `[channels]`, of all positions (divided by their number).
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, *, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.process_group = process_group
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Update the statistics in training mode, then normalise."""
        if self.training:
            self.update(features)
        return self.normalize(features)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add all positions of a map, and those of the other processes' maps, to the statistics."""
        mean, variance = channel_moments(features)
        count = torch.full_like(mean[:1], features.numel() // features.shape[1])
        # Sums add up over processes; in float64 their difference does not cancel.
        sums = torch.cat([count, count * mean, count * (variance + mean.square())])
        if self.process_group is not None:
            dist.all_reduce(sums, group=self.process_group)
        finite = sums.isfinite().all()
        count = sums[0]
        mean, squares = (sums[1:] / count).chunk(2)
        # Two sets of positions as one (Chan et al., 1979).
        share = count / (self.count + count)
        change = mean - self.mean
        within = torch.lerp(self.variance.double(), (squares - mean.square()).clamp(min=0), share)
        variance = within + share * (1 - share) * change.square()
        # Chosen on the device, without waiting for it.
        self.variance.copy_(variance.where(finite, self.variance))
        self.mean.copy_((self.mean + share * change).where(finite, self.mean))
        self.count.add_(count.long() * finite)

    def _apply(self, fn: Any, recurse: bool = True) -> Standardization:
        exact = {name: getattr(self, name) for name in ("mean", "variance")}
        super()._apply(fn, recurse)
        for name, statistics in exact.items():
            # A network may be turned to 16 bits; means over thousands of maps would then stop moving, and overflow.
            if getattr(self, name).itemsize < statistics.itemsize:
                setattr(self, name, statistics.to(getattr(self, name).device))
        return self

    def normalize(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Normalise with the statistics as they are, and resize to `size` where it is given (as `resize` does)."""
        spread = self.variance.sqrt()
        scale = torch.where(spread > _CONSTANT * self.mean.abs(), 1 / spread, 0.0)
        return standardize(features, self.mean, scale, size or (features.shape[-2], features.shape[-1]))

    def extra_repr(self) -> str:
        return str(len(self.mean))


_CONSTANT = 1e-6
"""Spread over mean of a channel that counts as constant: what rounding to float32 leaves of one."""
