"""Time and memory of windowed distillation, forward and backward, one stage.

    python benchmarks/mwad_throughput.py                 # the stages quoted in the documentation
    python benchmarks/mwad_throughput.py --sweep         # against the map's tokens, the window side M, the channels D
    python benchmarks/mwad_throughput.py --sweep tokens  # one of the three; the picture shows those measured so far
    python benchmarks/mwad_throughput.py --quick         # one small stage, to see that everything runs

Runs on the GPU when there is one, else on two CPU threads; there the Triton kernels are not timed, and what they need
of each GPU target is printed instead. On a CPU a floor stands beside each stage: the products at the rate of this
machine's matrix product, the exponentials at that of `torch.exp` in cache, both maps and gradients at that of a copy.
Writes a CSV file to `benchmarks/results/`, unless `--quick`, and after a sweep a picture of time and memory. Peak
memory is what a call needs beyond its inputs, its results (the two gradients) included. The ideal reads both maps and
writes both gradients once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness import Case, Measurement, Provider, Session, require_positive
from result_rows import stored_rows
from sward_kernels import windowed_distillation

RESULTS = Path(__file__).parent / "results"
BASELINE = "reference"
CPU_THREADS = 2


class Stage(NamedTuple):
    batch: int
    dim: int
    height: int
    width: int
    window_size: int
    shift: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return (
            f"B={self.batch} D={self.dim} {self.height}x{self.width} M={self.window_size} shift={self.shift} "
            f"{str(self.dtype).removeprefix('torch.')} {layout}"
        )


QUOTED = Stage(4, 24, 128, 256, 8, (3, 5))
WIDE = Stage(8, 64, 64, 64, 8, (3, 5))
DEFAULT = (WIDE, WIDE._replace(batch=2, width=128), QUOTED, QUOTED._replace(channels_last=True))
SWEPT = Stage(2, 32, 64, 128, 8, (3, 5))


class Sweep(NamedTuple):
    label: str
    stages: dict[int, Stage]


SWEEPS = {
    "tokens": Sweep(
        "tokens of the map, B H W (M=8, D=32)",
        {2 * height * width: SWEPT._replace(height=height, width=width)
         for height, width in ((16, 32), (32, 64), (64, 128), (128, 256))},
    ),
    "window_size": Sweep(
        "window side M (D=32, 2x64x128 tokens)",
        {side: SWEPT._replace(window_size=side, shift=(side // 2, side // 2)) for side in (2, 4, 7, 8, 12, 16)},
    ),
    "dim": Sweep(
        "channels D (M=8, 2x64x128 tokens)", {dim: SWEPT._replace(dim=dim) for dim in (8, 16, 32, 64, 128)}
    ),
}  # fmt: skip
QUICK = (Stage(1, 8, 16, 24, 4, (1, 2)),)

Loss = Callable[[Tensor, Tensor], Tensor]


def maps_of(stage: Stage, device: torch.device) -> list[Tensor]:
    """The student's map and the teacher's."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if stage.channels_last else torch.contiguous_format
    shape = (stage.batch, 3 * stage.dim, stage.height, stage.width)
    maps = [torch.randn(shape, generator=generator).to(device, stage.dtype, memory_format=layout) for _ in range(2)]
    return [one.requires_grad_() for one in maps]


def provider(name: str, loss: Loss, maps: list[Tensor]) -> Provider:
    def run() -> dict[str, Tensor]:
        value = loss(*maps)
        student, teacher = torch.autograd.grad(value, maps)
        return {"loss": value, "gradient_student": student, "gradient_teacher": teacher}

    return Provider(name, run)


def compare(session: Session, stage: Stage, max_seconds: float) -> list[Measurement]:
    """Check and time every implementation on one stage."""

    def ours(implementation: str) -> Loss:
        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            return windowed_distillation(
                qkv_student=student,
                qkv_teacher=teacher,
                window_size=stage.window_size,
                shift=stage.shift,
                implementation=implementation,
            ).loss

        return loss

    maps = maps_of(stage, session.device)
    oracle = provider("oracle", ours("reference"), [one.detach().double().requires_grad_() for one in maps]).run()
    torch._dynamo.reset()  # torch.compile(reference) gets each stage for itself, at its fastest
    providers = [
        provider(BASELINE, ours("reference"), maps),
        provider("torch.compile(reference)", torch.compile(ours("reference"), fullgraph=True), maps),
        provider("eager", ours("eager"), maps),
        provider("compiled", ours("compiled"), maps),
    ]
    if session.device.type == "cuda":
        providers.append(provider("triton", ours("triton"), maps))
    elif stage.dtype == torch.float32:
        providers.append(provider("native", ours("native"), maps))
    gradient_bytes = sum(one.numel() * one.element_size() for one in maps)
    case = Case(
        name=str(stage),
        oracle={name: value.detach() for name, value in oracle.items()},
        tolerance=1e-4 if stage.dtype == torch.float32 else 2e-2,
        ideal_bytes=2 * gradient_bytes,
        baseline=BASELINE,
    )
    rows = session.run(case, providers, rounds=15, max_seconds=max_seconds)
    if all(row.gate_is_green for row in rows):
        times = {row.provider: row.p50_ms for row in rows}
        print(f"compiled over torch.compile(reference): {times['torch.compile(reference)'] / times['compiled']:.2f}x")
        if "native" in times:
            print_floor(stage, maps[0].detach(), times["native"])
        for row in rows:
            print(f"peak of {row.provider}: {row.peak_extra_bytes / gradient_bytes:.2f}x the gradient bytes")
    return rows


def print_floor(stage: Stage, one_map: Tensor, native_ms: float) -> None:
    """Print the least time that this machine could take for a stage, and how far `native` is from it."""
    square, in_cache, copied = torch.randn(1024, 1024), torch.randn(2**16), torch.empty_like(one_map)
    result = torch.empty_like(in_cache)
    product = fastest_ms(lambda: square @ square) / 1024**3
    exponential = fastest_ms(lambda: torch.exp(in_cache, out=result)) / in_cache.numel()
    copy = fastest_ms(lambda: copied.copy_(one_map))
    pixels, tokens = stage.batch * stage.height * stage.width, stage.window_size**2
    parts = {
        # Scores, contexts, and the gradients of contexts (2), queries and keys, for both sides.
        "products": 12 * pixels * tokens * stage.dim * product,
        "exponentials": 2 * pixels * tokens * exponential,
        "maps and gradients": 2 * copy,
    }
    print(
        f"floor: {sum(parts.values()):.1f} ms ({', '.join(f'{name} {ms:.1f}' for name, ms in parts.items())}); "
        f"native takes {native_ms / sum(parts.values()):.2f} times as long"
    )


def fastest_ms(run: Callable[[], object]) -> float:
    """The fastest of 20 calls, in milliseconds."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def table_of(results: Path, device: torch.device, sweep: str | None = None) -> Path:
    return results / f"mwad_throughput_{device.type}{f'_{sweep}' if sweep else ''}.csv"


def plot_sweeps(results: Path, device: torch.device, path: Path) -> None:
    """Draw time and memory of every provider against what was swept, from the tables of the sweeps measured so far."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = {name: table_of(results, device, name) for name in SWEEPS}
    tables = {name: table for name, table in tables.items() if table.exists()}
    figure, axes = pyplot.subplots(2, len(tables), figsize=(1 + 4.2 * len(tables), 8), squeeze=False, sharey="row")
    for (name, table), (time_axis, memory_axis) in zip(tables.items(), axes.T):
        rows = {(row["case"], row["provider"]): row for row in stored_rows(table)}
        for provider in dict.fromkeys(provider for _, provider in rows):
            own = {x: rows[str(stage), provider] for x, stage in SWEEPS[name].stages.items()}
            low, middle, high = ([float(row[f"{q}_ms"]) for row in own.values()] for q in ("p20", "p50", "p80"))
            (line,) = time_axis.plot(list(own), middle, marker="o", markersize=4, label=provider)
            time_axis.fill_between(list(own), low, high, alpha=0.2, color=line.get_color())
            peaks = [int(row["peak_extra_bytes"]) / 2**20 for row in own.values()]
            memory_axis.plot(list(own), peaks, marker="o", markersize=4, label=provider)
        for axis in (time_axis, memory_axis):
            axis.set(xscale="log", yscale="log", xlabel=SWEEPS[name].label)
            axis.set_xticks(list(SWEEPS[name].stages), [str(x) for x in SWEEPS[name].stages], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("forward and backward, ms\n(median, band from 20 to 80 %)")
    axes[1, 0].set_ylabel("peak beyond the inputs, MiB")
    axes[0, 0].legend()
    device_name = next(iter(rows.values()))["device"]
    figure.suptitle(f"Windowed distillation, fp32 NCHW\n{device_name}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def print_resources() -> None:
    """Print what the Triton kernels need of each GPU target, compiled here without a GPU."""
    from sward_kernels import report
    from sward_kernels.resources import Configuration
    from sward_kernels.targets import TARGETS

    details = {"window_size": QUOTED.window_size, "dim": 64, "dtype": "bf16", "layout": "channels_last"}

    def quoted(shipped: Configuration) -> bool:
        return shipped.operation == "windowed_distillation" and details.items() <= shipped.details.items()

    print("\nTriton kernels, M=8 D=64 bf16 channels_last, compiled ahead of time (resources, not measurements):")
    for row in report.report(list(TARGETS), quoted):
        print(
            f"{row['target']:>6} {row['pass']:<8} registers {row['registers']:>3}  spill {row['spill_bytes']} B  "
            f"shared {row['shared_bytes']:>5} of {row['shared_limit']} B  occupancy {row['occupancy']:.2f}  "
            f"at least {row['bound_nanoseconds']:.1f} ns per window on a {TARGETS[row['target']].device} (bound)"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--sweep", nargs="*", choices=SWEEPS, metavar="WHAT", help=f"sweep {', '.join(SWEEPS)} (default: all of them)"
    )
    size.add_argument("--quick", action="store_true", help="one small stage; writes no file")
    parser.add_argument("--seconds", type=float, default=20.0, help="timing budget of one stage (default: 20)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    arguments = parser.parse_args()
    require_positive(parser, arguments, "seconds")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    sweeps = None if arguments.sweep is None else arguments.sweep or list(SWEEPS)
    exit_code = 0
    for name in sweeps or [None]:
        session = Session("mwad_throughput", device)
        session.print_banner()
        stages = SWEEPS[name].stages.values() if name else QUICK if arguments.quick else DEFAULT
        for stage in stages:
            compare(session, stage, arguments.seconds)
        if not arguments.quick:
            session.write_csv(table_of(arguments.results, device, name))
        exit_code = max(exit_code, session.exit_code)
    if sweeps:
        plot_sweeps(arguments.results, device, arguments.results / f"mwad_throughput_{device.type}.png")
    if device.type == "cpu" and not arguments.quick:
        print_resources()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
