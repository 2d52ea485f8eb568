"""Turn what a layer returns into a map `[B, C, h, w]`: NCHW, NHWC or tokens, found from the shape of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from torch import Tensor

Format = Literal["auto", "nchw", "nhwc", "tokens"]
"""How a layer arranges its output: `[B, C, h, w]`, `[B, h, w, C]` or `[B, tokens, C]`."""


class TapArguments(TypedDict):
    """The keyword arguments that `FeatureTaps` and `map_channels` share."""

    format: Format
    prefix_tokens: int | Literal["auto"]
    select: int | str


MAIN_KEYS = ("out", "logits", "last_hidden_state")
"""Keys of the main output in the dictionaries of torchvision and transformers."""

MOST_PREFIX_TOKENS = 8
"""The most class and register tokens that are looked for; more must be given as `prefix_tokens`."""


@dataclass(frozen=True)
class Layout:
    """One way to read an output."""

    format: Format
    """`"nchw"`, `"nhwc"` or `"tokens"`."""
    grid: tuple[int, int]
    """Height and width of the map."""
    prefix_tokens: int = 0
    """Tokens in front of those of the grid."""

    def to_map(self, output: Tensor) -> Tensor:
        """Return `output` as `[B, C, h, w]`; a view where possible."""
        if self.format == "nchw":
            return output
        if self.format == "nhwc":
            return output.permute(0, 3, 1, 2)
        return output[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)


def check_choice(format: str, prefix_tokens: int | str) -> None:
    """Raise a ValueError for an unknown format or number of prefix tokens."""
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(map(repr, get_args(Format)))}, got {format!r}")
    if prefix_tokens != "auto" and (not isinstance(prefix_tokens, int) or prefix_tokens < 0):
        raise ValueError(f"prefix_tokens must be 'auto' or a number of at least 0, got {prefix_tokens!r}")


def select(output: Any, choice: int | str, name: str) -> Tensor:
    """Return the tensor of a layer's output: itself, or an item of a tuple, list, dictionary or `ModelOutput`.

    Args:
        output: what the layer returned.
        choice: index into a tuple or list, or key of a dictionary. With an index, a dictionary gives its only tensor
            or the one under a key of `MAIN_KEYS`.
        name: how to call the layer in errors.

    Raises:
        ValueError: if there is no such item, or it is not a tensor; the message lists what there is.
    """
    if isinstance(output, Tensor):
        return output
    held: dict[Any, Any]
    if isinstance(output, Mapping):
        held = dict(output)
        if not isinstance(choice, str):
            tensors = [key for key, value in held.items() if isinstance(value, Tensor)]
            main = [key for key in MAIN_KEYS if key in tensors]
            choice = tensors[0] if len(tensors) == 1 else main[0] if main else choice
    elif isinstance(output, Sequence) and not isinstance(output, str):
        held = dict(enumerate(output))
        choice = choice + len(output) if isinstance(choice, int) and choice < 0 else choice
    else:
        raise ValueError(f"{name} must return a tensor, or a tuple or dictionary of tensors, got {describe(output)}")
    if not isinstance(held.get(choice), Tensor):
        listed = ", ".join(f"{key!r}: {describe(value)}" for key, value in held.items())
        raise ValueError(f"select must name a tensor in the output of {name}, got {choice!r}; it holds {{{listed}}}")
    return held[choice]


def layouts(
    output: Tensor,
    images: tuple[int, ...],
    format: Format = "auto",
    prefix_tokens: int | Literal["auto"] = "auto",
) -> list[Layout]:
    """Return every way to read `output` as a map of images with the shape `images`, `[B, 3, H, W]`.

    A map of a grid has the aspect ratio of the images, up to rounding: an axis of channels hardly ever does.
    """
    size = (images[-2], images[-1])
    found: list[Layout] = []
    if output.shape[0] != images[0]:
        return found
    if output.dim() == 4:
        _, first, second, third = output.shape
        if format in ("auto", "nchw") and fits((second, third), size):
            found.append(Layout("nchw", (second, third)))
        if format in ("auto", "nhwc") and fits((first, second), size):
            found.append(Layout("nhwc", (first, second)))
    elif output.dim() == 3 and format in ("auto", "tokens"):
        allowed = range(MOST_PREFIX_TOKENS + 1) if prefix_tokens == "auto" else (prefix_tokens,)
        for count in allowed:
            grid = _token_grid(output.shape[1] - count, size)
            if grid is not None:
                found.append(Layout("tokens", grid, count))
    return found


def fits(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether a grid has the aspect ratio of images of `size`, up to one row and column of rounding."""
    (low, high), (left, right) = (_strides(cells, length) for cells, length in zip(grid, size))
    return low < right and left < high


def same_layout(
    one: tuple[Layout, Tensor], other: tuple[Layout, Tensor], sizes: tuple[tuple[int, int], tuple[int, int]]
) -> bool:
    """Return whether two readings, of outputs for images of two sizes, can be the same layout.

    The channels of a map do not depend on the size of the images, and its grid does. Tokens all have the same channels;
    there the grid must grow in proportion.
    """
    (first, small), (second, large) = one, other
    if (first.format, first.prefix_tokens) != (second.format, second.prefix_tokens):
        return False
    if first.format != "tokens":
        same_channels = first.to_map(small).shape[1] == second.to_map(large).shape[1]
        return same_channels and first.grid[0] != second.grid[0] and first.grid[1] != second.grid[1]
    return all(
        abs(cells * length / before - after) <= 1
        for cells, after, before, length in zip(first.grid, second.grid, *sizes)
    )


def any_layout(output: Tensor) -> list[Layout]:
    """Return both ways to read a 4-d output, whatever its grid."""
    _, first, second, third = output.shape
    return [Layout("nchw", (second, third)), Layout("nhwc", (first, second))]


def resolve(
    output: Tensor,
    images: tuple[int, ...],
    larger: tuple[Tensor, tuple[int, ...]] | None,
    format: Format = "auto",
    prefix_tokens: int | Literal["auto"] = "auto",
) -> list[Layout]:
    """Return the ways to read `output` that also hold for larger images; one if there is no doubt.

    Args:
        output: of a layer, for images of the shape `images`.
        images: `(B, 3, H, W)`.
        larger: the output of the layer for images of another shape, and that shape; None if the network takes one size.
        format: as in `sward.features.FeatureTaps`.
        prefix_tokens: as there.
    """
    found = layouts(output, images, format, prefix_tokens)
    if larger is None or output.shape[0] != images[0]:
        return found
    other, second = larger
    by_axes = output.dim() == other.dim() == 4 and format == "auto"
    ways = any_layout(output) if by_axes else found
    others = any_layout(other) if by_axes else layouts(other, second, format, prefix_tokens)
    sizes = ((images[-2], images[-1]), (second[-2], second[-1]))
    return [way for way in ways if any(same_layout((way, output), (each, other), sizes) for each in others)]


def _strides(cells: int, length: int) -> tuple[float, float]:
    """Return the bounds of the strides that can turn `length` pixels into `cells` cells."""
    return length / (cells + 1), length / (cells - 1) if cells > 1 else float("inf")


def _token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid of `tokens` patches: the same whole patch side both ways, or else the aspect ratio alone."""
    if tokens < 1:
        return None
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    fitting = [grid for grid in grids if fits(grid, size)]
    return min(fitting, key=lambda grid: abs(grid[0] * size[1] - grid[1] * size[0]), default=None)


def without_doubt(found: list[Layout], images: tuple[int, ...]) -> Layout | None:
    """Return the one way to read an output of images with the shape `images`; None if there are several or none.

    Tokens count only if they divide the image into square patches without a rest.
    """
    whole = [way for way in found if way.format != "tokens" or _whole_patches(way, (images[-2], images[-1]))]
    return whole[0] if len(whole) == 1 else None


def _whole_patches(layout: Layout, size: tuple[int, int]) -> bool:
    (rows, columns), (height, width) = layout.grid, size
    return height % rows == 0 and width % columns == 0 and height // rows == width // columns


def describe(value: Any) -> str:
    """Describe an output in an error message."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def refuse_probabilities(logits: Tensor, network: str) -> None:
    """Raise a ValueError if `[B, K, h, w]` with K > 1 holds probabilities; `network` names theirs in the message."""
    numbers = logits.detach().float()
    near_one = (numbers.sum(dim=1) - 1).abs() < 1e-2
    if logits.shape[1] > 1 and bool((numbers >= 0).all() and near_one.all()):
        raise ValueError(
            f"{network} must return logits, got probabilities; leave out its softmax, which the loss takes"
        )


def logits_of(output: Any, network: str) -> Tensor:
    """Return the logits `[B, K, h, w]` in what a segmentation network returned: a tensor, tuple or dictionary.

    Raises:
        ValueError: if there are none; `network` names it in the message.
    """
    logits = select(output, 0, f"the {network}")
    if logits.dim() != 4:
        raise ValueError(f"the {network} must return logits [B, K, H, W], got {describe(logits)}")
    return logits
