"""Time and memory of the prototype regularization, forward and backward, against the usual ways to write it.

    python benchmarks/pdr_throughput.py             # the shapes of three networks
    python benchmarks/pdr_throughput.py --sweep     # over classes and over pixels as well, with a figure

Runs on the GPU when there is one. Writes a CSV file (and a PNG after a sweep) to `benchmarks/results/`; without a
sweep the file keeps the rows of the last one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Case, Measurement, Provider, Session, device_of, require_positive
from sward_kernels import prototype_discrimination

MARGIN = 1.3
RESULTS = Path(__file__).parent / "results"
USUAL = ("class loop", "one-hot", "one-hot compiled")


class Shape(NamedTuple):
    batch: int
    channels: int
    height: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"({self.batch}, {self.channels}, {self.height}, {self.width}) K={self.classes}"


# The deepest encoder maps of the Cityscapes, polyp and wide students at the paper's batch and crop sizes.
NETWORKS = (Shape(16, 96, 32, 64, 19), Shape(8, 256, 64, 64, 2), Shape(16, 576, 32, 64, 19))
CLASS_SWEEP = tuple(Shape(8, 256, 32, 64, classes) for classes in (2, 8, 19, 64, 150))
PIXEL_SWEEP = tuple(Shape(batch, 256, 32, 64, 19) for batch in (1, 2, 4, 8, 16))


def separation(prototypes: Tensor, present: Tensor) -> Tensor:
    """Eq. 16 by autograd, as one would write it: the pairwise hinge over present classes."""
    squared = (prototypes[:, None] - prototypes[None, :]).square().sum(-1)
    shortfall = (MARGIN - (squared + 1e-12).sqrt()).clamp(min=0)
    pairs = (present[:, None] & present[None, :]).triu(diagonal=1)
    return (shortfall * pairs).sum() / pairs.sum().clamp(min=1)


def class_loop(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Boolean indexing, one class at a time."""
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
    labels = labels.flatten()
    means, traces = [], []
    for k in range(num_classes):
        members = pixels[labels == k]
        if len(members) == 0:
            continue
        means.append(members.mean(0))
        traces.append(members.var(0).sum() if len(members) > 1 else members.new_zeros(()))
    prototypes = torch.stack(means)
    present = torch.ones(len(means), dtype=torch.bool, device=features.device)
    return separation(prototypes, present) + torch.stack(traces).mean()


def one_hot(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Membership matrix and autograd."""
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
    member = F.one_hot(labels.flatten().long(), num_classes).to(pixels.dtype)
    counts = member.sum(0)
    present = counts > 0
    prototypes = (member.T @ pixels) / counts.clamp(min=1)[:, None]
    scatter = member.T @ (pixels - member @ prototypes).square().sum(1)
    return separation(prototypes, present) + (scatter / (counts - 1).clamp(min=1)).sum() / present.sum()


def provider(name: str, loss_of: Callable[[Tensor], Tensor], features: Tensor) -> Provider:
    def run() -> dict[str, Tensor]:
        loss = loss_of(features)
        (gradient,) = torch.autograd.grad(loss, features)
        return {"loss": loss, "gradient": gradient}

    return Provider(name, run)


def ours(labels: Tensor, num_classes: int, implementation: str) -> Callable[[Tensor], Tensor]:
    return lambda x: prototype_discrimination(x, labels, num_classes, implementation=implementation).loss


def compare(session: Session, shape: Shape, dtype: torch.dtype, max_seconds: float) -> list[Measurement]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(shape.classes, (shape.batch, shape.height, shape.width), generator=generator)
    centres = torch.randn(shape.classes, shape.channels, generator=generator)
    noise = torch.randn(shape.batch, shape.height, shape.width, shape.channels, generator=generator)
    features = (centres[labels] * 0.05 + noise).permute(0, 3, 1, 2).contiguous()
    features = features.to(session.device, dtype).requires_grad_()
    labels = labels.to(session.device)

    oracle_provider = provider(
        "oracle", ours(labels, shape.classes, "reference"), features.detach().double().requires_grad_()
    )
    torch._dynamo.reset()  # each shape is compiled for itself, as the first shape of a training run would be
    compiled_one_hot = torch.compile(one_hot)
    providers = [
        provider("class loop", lambda x: class_loop(x, labels, shape.classes), features),
        provider("one-hot", lambda x: one_hot(x, labels, shape.classes), features),
        provider("one-hot compiled", lambda x: compiled_one_hot(x, labels, shape.classes), features),
        provider("eager", ours(labels, shape.classes, "eager"), features),
        provider("compiled", ours(labels, shape.classes, "compiled"), features),
    ]
    if session.device.type == "cuda":
        providers.append(provider("triton", ours(labels, shape.classes, "triton"), features))
    # Each pass reads the features once; the backward pass also writes their gradient once.
    ideal_bytes = 3 * features.numel() * features.element_size() + 2 * labels.numel() * labels.element_size()
    case = Case(
        name=f"{shape} {dtype}".replace("torch.", ""),
        oracle={name: tensor.detach() for name, tensor in oracle_provider.run().items()},
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        ideal_bytes=ideal_bytes,
        baseline="one-hot",
    )
    rows = session.run(case, providers, rounds=21, max_seconds=max_seconds)
    if all(row.gate_is_green for row in rows):
        best_usual = min(row.p50_ms for row in rows if row.provider in USUAL)
        best_ours = min((row for row in rows if row.provider not in USUAL), key=lambda row: row.p50_ms)
        print(f"{best_ours.provider} over the best of {', '.join(USUAL)}: {best_usual / best_ours.p50_ms:.2f}x")
    return rows


def plot(classes: Sequence[list[Measurement]], pixels: Sequence[list[Measurement]], path: Path, device: str) -> None:
    """Draw the milliseconds of every provider over classes (left) and pixels (right), with the 20-80 % band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    panels = (
        (axes[0], classes, [shape.classes for shape in CLASS_SWEEP], "classes"),
        (
            axes[1],
            pixels,
            [shape.batch * shape.height * shape.width for shape in PIXEL_SWEEP],
            "pixels",
        ),
    )
    for axis, cases, positions, label in panels:
        for index, row in enumerate(cases[0]):
            series = [case[index] for case in cases]
            (line,) = axis.plot(positions, [item.p50_ms for item in series], marker="o", label=row.provider)
            axis.fill_between(
                positions,
                [item.p20_ms for item in series],
                [item.p80_ms for item in series],
                color=line.get_color(),
                alpha=0.2,
            )
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms, forward + backward")
        axis.set_xticks(positions, [str(position) for position in positions])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_title(f"{CLASS_SWEEP[0].batch} x 256 channels x 32 x 64")
    axes[1].set_title("19 classes, 256 channels")
    axes[0].legend()
    figure.suptitle(f"Prototype regularization, fp32, {device}")
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also sweep classes and pixels, and draw the figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=15.0, help="time budget per shape after warm-up")
    options = parser.parse_args()
    require_positive(parser, options, "seconds")
    device = device_of(parser, options.device)

    dtype = getattr(torch, options.dtype)
    session = Session("pdr_throughput", device)
    session.print_banner()
    for shape in NETWORKS:
        compare(session, shape, dtype, options.seconds)
    stem = f"pdr_throughput_{session.device.type}_{options.dtype}"
    if options.sweep:
        classes = [compare(session, shape, dtype, options.seconds) for shape in CLASS_SWEEP]
        pixels = [compare(session, shape, dtype, options.seconds) for shape in PIXEL_SWEEP]
        plot(classes, pixels, RESULTS / f"{stem}.png", session.device_name)
    session.write_csv(RESULTS / f"{stem}.csv")
    return session.exit_code


if __name__ == "__main__":
    sys.exit(main())
