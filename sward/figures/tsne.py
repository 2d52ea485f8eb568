"""t-SNE of the penultimate features of several networks, and measures of class separability (Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sward.alignment import resize, resize_labels
from sward.data import DatasetInfo, SegmentationDataset
from sward.features import FeatureTaps
from sward.figures.style import plot_library, save_figure


@dataclass(frozen=True)
class Separability:
    """Separability of the classes in a feature space."""

    silhouette: float
    """Mean silhouette coefficient with Euclidean distances (Rousseeuw, 1987), -1 to 1."""
    fisher: float
    """Result of `fisher_ratio`."""


def sample_pixels(labels: Sequence[Tensor], info: DatasetInfo, per_class: int, seed: int = 0) -> list[Tensor]:
    """Draw up to `per_class` pixels per class from all label maps together.

    Args:
        labels: integer maps `[h, w]`.
        info: classes and ignore_index.
        per_class: pixels per class; a class with fewer contributes all of them.
        seed: seed of the draw.

    Returns:
        For each map the sorted flat indices of its chosen pixels, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.full((each.numel(),), index) for index, each in enumerate(labels)])
    position = torch.cat([torch.arange(each.numel()) for each in labels])
    flat = torch.cat([each.flatten() for each in labels])
    chosen = []
    for index in range(info.num_classes):
        if index == info.ignore_index:
            continue
        members = (flat == index).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)[:per_class]
        chosen.append(members[order])
    taken = torch.cat(chosen)
    return [position[taken[owner[taken] == index]].sort().values for index in range(len(labels))]


@torch.no_grad()
def pixel_features(
    network: nn.Module,
    layer: str,
    dataset: SegmentationDataset,
    images: Sequence[int],
    *,
    grid: tuple[int, int],
    per_class: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Collect features of pixels that depend on the labels only, so that all networks are compared on the same pixels.

    The map of `layer` and the labels are resized to `grid`; `sample_pixels` then draws the pixels.

    Args:
        network: in eval mode, on the CPU.
        layer: layer whose map is read.
        dataset: an evaluation split at the image size of the network.
        images: indices into the data set.
        grid: rows and columns; the same for all networks.
        per_class: pixels per class over all images.

    Returns:
        Features `[n, C]` and labels `[n]`.
    """
    samples = [dataset[index] for index in images]
    labels = [resize_labels(sample.labels[None], grid)[0] for sample in samples]
    taken = sample_pixels(labels, dataset.info, per_class)
    features = []
    with FeatureTaps(network, [layer]) as taps:
        for sample, pixels in zip(samples, taken, strict=True):
            network(sample.image[None])
            (maps,) = taps.collect().values()
            features.append(resize(maps.float(), grid)[0].flatten(1).T[pixels])
    classes = torch.cat([each.flatten()[pixels] for each, pixels in zip(labels, taken, strict=True)])
    return torch.cat(features).numpy(), classes.long().numpy()


def fisher_ratio(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return `tr(S_B) / tr(S_W)`: the scatter of class means around the overall mean over that within classes.

    Args:
        features: `[n, C]`.
        labels: `[n]`, at least two classes.
    """
    points = features.astype(np.float64)
    centre = points.mean(axis=0)
    between = within = 0.0
    for index in np.unique(labels):
        members = points[labels == index]
        mean = members.mean(axis=0)
        between += len(members) * float(((mean - centre) ** 2).sum())
        within += float(((members - mean) ** 2).sum())
    return between / max(within, np.finfo(np.float64).tiny)


def separability(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Separability:
    """Compute silhouette and Fisher ratio in the feature space itself, not in the t-SNE plane."""
    from sklearn.metrics import silhouette_score

    return Separability(float(silhouette_score(features, labels)), fisher_ratio(features, labels))


def feature_space_figure(
    panels: Mapping[str, tuple[NDArray[np.float32], NDArray[np.int64]]], info: DatasetInfo, path: Path, *, seed: int = 0
) -> tuple[Path, dict[str, Separability]]:
    """Draw one t-SNE plot per network, coloured by class, and bars of silhouette and Fisher ratio (Fig. 4).

    Args:
        panels: title -> features and labels from `pixel_features`.
        info: classes and colours.
        path: path of the PNG; an SVG is written beside it.
        seed: seed of the t-SNE.

    Returns:
        The path of the PNG and the measures of each panel.
    """
    from sklearn.manifold import TSNE

    plt = plot_library()
    measured = {title: separability(*panel) for title, panel in panels.items()}
    lines = 1 if len(panels) <= 3 else 2
    columns = -(-len(panels) // lines)
    figure = plt.figure(figsize=(3.2 * columns + 2.8, 3.1 * lines + 0.4), layout="constrained")
    # Two rows for the bars; a single line of panels spans both.
    grid = figure.add_gridspec(2, columns + 1, width_ratios=[*[1.0] * columns, 0.8])
    for index, (title, (features, labels)) in enumerate(panels.items()):
        place = grid[index // columns, index % columns] if lines == 2 else grid[:, index]
        axis = figure.add_subplot(place)
        points = TSNE(perplexity=min(30, (len(labels) - 1) / 3), init="pca", random_state=seed).fit_transform(features)
        # Draw in random order, so that no class covers the others.
        order = np.random.default_rng(seed).permutation(len(labels))
        axis.scatter(*points[order].T, c=visible_colours(info)[labels[order]], s=8, linewidths=0, rasterized=True)
        axis.set(xticks=[], yticks=[], title=f"({chr(ord('a') + index)}) {title}")
        axis.spines[:].set_visible(True)
        axis.spines[:].set_color("0.8")
    for line, (name, field) in enumerate((("silhouette", "silhouette"), ("Fisher ratio", "fisher"))):
        axis = figure.add_subplot(grid[line, columns])
        values = [getattr(each, field) for each in measured.values()]
        bars = axis.barh(list(measured), values, color="0.55", height=0.6)
        # Adding zero turns -0.0 into 0.0.
        axis.bar_label(bars, [f"{round(value, 2) + 0.0:.2f}" for value in values], padding=3)
        axis.margins(x=0.25)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.invert_yaxis()
        axis.set(title=name, xticks=[])
        axis.spines["bottom"].set_visible(False)
    present = np.unique(np.concatenate([labels for _, labels in panels.values()]))
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", markersize=7, color=visible_colours(info)[index])
        for index in present
    ]
    names = [info.classes[index] for index in present]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 7), frameon=False)
    return save_figure(figure, path), measured


def visible_colours(info: DatasetInfo) -> NDArray[np.float64]:
    """Return the palette as RGB from 0 to 1, `[K, 3]`, for points on white; near-white colours become blue."""
    colours = np.array(info.palette, dtype=np.float64) / 255
    colours[colours.min(axis=1) > 0.9] = (0.12, 0.47, 0.71)
    return colours
