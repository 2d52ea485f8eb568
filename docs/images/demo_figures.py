"""Draws the pictures of README and docs/reproduce.md from the runs of `sward demo`.

    sward demo
    python docs/images/demo_figures.py runs/demo

Each class is shown in the first test scene of which it covers a tenth; nothing is chosen by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from sward.data.scenes import INFO
from sward.figures.gradcam import activation_figure, activation_inside, grad_cam
from sward.reproduce.experiments import EvaluationSet
from sward.reproduce.figures import (
    TrainedNetwork,
    activation_row,
    draw_attention,
    draw_feature_space,
    draw_predictions,
    load_network,
)

HERE = Path(__file__).parent
TEST = EvaluationSet("test scenes", "test", ())
RUNS = {"teacher": "teacher", "student alone": "none-seed0", "student + SWARD": "sward-seed0"}


def main(runs: Path) -> None:
    """Draw every picture from the runs in this folder, and print the mean of `activation_inside`."""
    networks = {title: load_network(runs / name, "last") for title, name in RUNS.items()}
    rows = [activation_row(networks, TEST, name, 0) for name in INFO.classes[1:]]
    for path in (
        draw_predictions(networks, TEST, range(6), HERE / "demo.png"),
        activation_figure(rows, HERE / "gradcam.png"),
        draw_attention(runs / RUNS["student + SWARD"], TEST, HERE / "attention.png"),
        draw_feature_space(networks, TEST, HERE / "features.png"),
    ):
        _keep_small(path)
    print_inside(networks)


def print_inside(networks: Mapping[str, TrainedNetwork]) -> None:
    """Print the share of the activation on the class: mean over all test scenes and the classes in each."""
    for title, each in networks.items():
        shares = []
        for sample in each.images(TEST):
            for target in range(1, INFO.num_classes):
                truth = sample.labels == target
                if truth.any():
                    activation = grad_cam(each.network, each.penultimate, sample.image, target)
                    share = activation_inside(activation, truth)
                    shares.append(0.0 if share != share else share)  # nan: no activation
        print(f"{title}: {100 * sum(shares) / len(shares):.0f} % inside, {len(shares)} maps")


def _keep_small(path: Path) -> None:
    """Replace PNG and SVG by a JPEG file, a fifth as large."""
    with Image.open(path) as image:
        image.convert("RGB").save(path.with_suffix(".jpg"), quality=90, subsampling=0, optimize=True)
    for suffix in (".png", ".svg"):
        path.with_suffix(suffix).unlink()
    path.with_suffix(".json").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
