"""Everything to run first on a GPU: is it right there, and how fast is it? One command, fifteen minutes on an H100.

    python benchmarks/gpu_suite.py                     # all parts, to benchmarks/results/NAME-OF-THE-DEVICE/
    python benchmarks/gpu_suite.py --parts tests bf16  # some of them
    python benchmarks/gpu_suite.py --rehearse          # tiny sizes in Triton's interpreter: no GPU, no times

Each part runs in a process of its own under a time limit, and its rows are kept as they come. Run the command again to
go on: parts that are done are not repeated, and neither are rows that a part has already measured; delete the folder to
start over. `report.md` in the folder holds one table of all rows. The exit status is 1 if anything failed.

Times are those of the device: while the host prepares a call, the device waits in a kernel that does nothing, and the
clock starts after it, behind a write that flushes the L2 cache. Each time is the median of several calls. Backward is
timed alone, through a retained graph; `eager` computes its gradients in the forward pass. `copy` moves as many bytes as
the operation must read and write at least.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import device_milliseconds, worst_error
from sward_kernels import prototype_discrimination, relational_kl, windowed_distillation
from sward_kernels.windows import WindowGrid

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
COLUMNS = ("part", "case", "provider", "pass", "dtype", "layout", "ms", "GB/s", "error", "note")
Row = dict[str, Any]


class Stage(NamedTuple):
    """Maps of one stage of MWAD."""

    batch: int
    height: int
    width: int
    dim: int = 64
    window_size: int = 8

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    def __str__(self) -> str:
        return f"B={self.batch} D={self.dim} {self.height}x{self.width} M={self.window_size}"


class Sizes(NamedTuple):
    """What the parts run on."""

    stages: tuple[Stage, ...]
    """The stages of the paper's presets; the first is the headline."""
    wide: Stage
    """A map of more than 2**31 elements."""
    prototypes: tuple[tuple[int, int, int, int, int], ...]
    """Batch, channels, height, width and classes."""
    relation: tuple[int, int, int]
    """Images, pixels and channels."""
    preset: str
    step: tuple[tuple[int, int], int] | None
    """Image size and batch of the training step; None for the preset's own."""
    rounds: int


PAPER = Sizes(
    stages=(
        # Cityscapes, crops of 512x1024: the four levels of SAM 2.1. Polyps, 512x512: those of MedSAM2.
        *(Stage(16, side, 2 * side) for side in (128, 64, 32, 16)),
        *(Stage(8, side, side) for side in (128, 64, 32, 16)),
    ),
    wide=Stage(1, 3376, 3376),
    prototypes=((16, 576, 32, 64, 19), (8, 256, 16, 16, 2), (8, 256, 64, 64, 2)),
    relation=(4, 2048, 256),
    preset="cityscapes-mbv3",
    step=None,
    rounds=11,
)
TINY = Sizes(
    stages=(Stage(1, 4, 4, 16, 4), Stage(1, 5, 3, 16, 4)),
    wide=Stage(1, 8, 4, 16, 4),
    prototypes=((1, 8, 4, 4, 3),),
    relation=(1, 20, 8),
    preset="demo",
    step=((64, 64), 1),
    rounds=1,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
TOLERANCE = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 1e-3, "tf32": 1e-2}
"""Largest error of a loss or gradient, divided by its largest value, against eager in fp32."""
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


class Suite:
    """The rows of one part, which are on disk as soon as they exist."""

    def __init__(self, part: str, folder: Path, rehearsal: bool) -> None:
        self.part, self.folder, self.rehearsal = part, folder, rehearsal
        self.sizes = TINY if rehearsal else PAPER
        self.device = torch.device("cpu" if rehearsal else "cuda")
        self._path = folder / f"{part}.jsonl"
        rows = read_rows(self._path)
        self._path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._known = {_place(row) for row in rows}

    def has(self, **place: str) -> bool:
        """Whether a row of this place exists already."""
        return _place({"part": self.part, **place}) in self._known

    def add(self, **row: Any) -> None:
        row = {"part": self.part, **row}
        self._known.add(_place(row))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{value}" for value in row.values()), flush=True)

    def attempt(self, run: Callable[[], Row], **place: str) -> None:
        """Add the row that `run` measures at a place, unless it is there; an error becomes the row's note."""
        if self.has(**place):
            return
        try:
            row = run()
        except Exception as error:
            if self.rehearsal:
                raise
            row = {"note": f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
        self.add(**place, **row)

    def milliseconds(self, run: Callable[[], object]) -> float:
        if self.rehearsal:  # one call of the interpreter is long enough
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        return device_milliseconds(run, self.device, self.sizes.rounds)


def read_rows(path: Path) -> list[Row]:
    """Return the complete rows of a file; the last may have been cut off by the time limit."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _place(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in COLUMNS[:6])


# ------------------------------------------------------------------------------------------------------ correctness


def run_tests(suite: Suite) -> None:
    """All tests of the Triton kernels, on the device."""
    paths = ["tests/kernels/windowed", "tests/kernels/prototypes", "tests/kernels/relation"]
    files = sorted(str(each) for path in paths for each in (REPOSITORY / path).glob("test_triton*.py"))
    common = ["-p", "no:cacheprovider", "-n", "8", "--dist", "load"]  # a compilation takes a core for seconds
    for name, marks in (("fast", "not slow"), ("slow", "slow")):
        # Compiling for other targets needs no GPU, and takes minutes.
        selection = [*common, "-m", marks, "-k", "not compile_within", *files]
        if suite.rehearsal:
            selection = [str(REPOSITORY / "tests/kernels/test_labels.py")]

        def run(name: str = name, selection: list[str] = selection) -> Row:
            log = suite.folder / f"tests_{name}.log"
            command = [sys.executable, "-m", "pytest", "-q", *selection]
            with log.open("w", encoding="utf-8") as file:
                status = subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, check=False)
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1].strip("= ")
            return {"note": f"{'' if status.returncode == 0 else 'FAILED: '}{last}; see {log.name}"}

        suite.attempt(run, case=f"{name} tests of the Triton kernels")


def check(suite: Suite) -> None:
    """What the tests are too small for, or need a device for."""
    checks = {
        "paper size": _check_paper_size,
        "more than 2**31 elements": _check_wide,
        "two streams": _check_streams,
        "CUDA graph": _check_graph,
        "compilations of four stages": _check_compilations,
    }
    for name, run in checks.items():
        for layout in LAYOUTS:
            suite.attempt(lambda run=run, layout=layout: run(suite, layout), case=name, layout=layout)  # type: ignore[misc]


def maps_of(stage: Stage, dtype: torch.dtype, layout: str, device: torch.device) -> list[Tensor]:
    """The student's and the teacher's map, made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (stage.batch, 3 * stage.dim, stage.height, stage.width)
    return [
        torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        .to(dtype=dtype, memory_format=LAYOUTS[layout])
        .requires_grad_()
        for _ in range(2)
    ]


def shift_on(device: torch.device) -> Tensor:
    """The shift of all calls, made before the clock runs: a copy to the device would wait for it."""
    return torch.tensor([1, 3], device=device)


def results_of(stage: Stage, maps: list[Tensor], implementation: str) -> dict[str, Tensor]:
    """The loss, and its gradients times the number of pixels, which float16 holds."""
    shift = shift_on(maps[0].device)
    loss = windowed_distillation(maps[0], maps[1], stage.window_size, shift, implementation=implementation).loss
    student, teacher = torch.autograd.grad(loss, maps, loss.new_tensor(stage.pixels))
    return {"loss": loss.detach(), "student": student, "teacher": teacher}


def oracle_of(stage: Stage, maps: list[Tensor]) -> dict[str, Tensor]:
    """Eager in fp32, in full precision."""
    with _fp32_products("ieee"):
        return results_of(stage, [each.detach().float().requires_grad_() for each in maps], "eager")


def _verdict(error: float, dtype: str) -> Row:
    return {"error": error, "note": "" if error <= TOLERANCE[dtype] else f"FAILED: more than {TOLERANCE[dtype]:g}"}


def _check_paper_size(suite: Suite, layout: str) -> Row:
    stage = suite.sizes.stages[0]
    maps = maps_of(stage, torch.float32, layout, suite.device)
    return _verdict(worst_error(results_of(stage, maps, "triton"), oracle_of(stage, maps)), "fp32")


def _check_wide(suite: Suite, layout: str) -> Row:
    """The last windows of a map whose offsets need 64 bits, against a small map that consists of them."""
    from sward_kernels.gpu import launching

    stage, rows = suite.sizes.wide, suite.sizes.wide.window_size
    generator = torch.Generator(suite.device).manual_seed(0)
    shape = (stage.batch, 3 * stage.dim, stage.height, stage.width)
    sides = []
    for _ in range(2):
        side = torch.empty(shape, dtype=torch.bfloat16, device=suite.device, memory_format=LAYOUTS[layout])
        sides.append(side.normal_(generator=generator).requires_grad_())
    if suite.rehearsal:
        launching.WIDE_FROM = 0
        launching.forget_calls()
    elif sides[0].numel() <= 2**31:
        raise ValueError(f"the map must have more than 2**31 elements, got {sides[0].numel()}")
    loss = windowed_distillation(sides[0], sides[1], stage.window_size, implementation="triton").loss
    gradients = torch.autograd.grad(loss * stage.height, sides)
    crops = [side.detach()[:, :, -rows:].requires_grad_() for side in sides]
    small = windowed_distillation(crops[0], crops[1], stage.window_size, implementation="eager").loss
    expected = torch.autograd.grad(small * rows, crops)  # both are sums over the same pixels, divided by the width
    names = ("student", "teacher")
    found = {name: gradient[:, :, -rows:] for name, gradient in zip(names, gradients)}
    return _verdict(worst_error(found, {name: each.float() for name, each in zip(names, expected)}), "bf16")


def _check_streams(suite: Suite, layout: str) -> Row:
    if suite.rehearsal:
        return {"note": "skipped: needs a GPU"}
    stage = suite.sizes.stages[1]
    calls = [maps_of(stage, torch.bfloat16, layout, suite.device) for _ in range(2)]
    expected = [results_of(stage, maps, "triton") for maps in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found = []
    for maps, stream in zip(calls, streams):
        with torch.cuda.stream(stream):
            found.append(results_of(stage, maps, "triton"))
    torch.cuda.synchronize()
    same = all(torch.equal(one[name], other[name]) for one, other in zip(expected, found) for name in one)
    return {"note": "same bits" if same else "FAILED: other bits than on one stream"}


def _check_graph(suite: Suite, layout: str) -> Row:
    if suite.rehearsal:
        return {"note": "skipped: needs a GPU"}
    stage = suite.sizes.stages[1]
    maps = maps_of(stage, torch.bfloat16, layout, suite.device)
    expected = results_of(stage, maps, "triton")
    shift = shift_on(suite.device)
    upstream = torch.full((), float(stage.pixels), device=suite.device)

    def call() -> tuple[Tensor, ...]:
        loss = windowed_distillation(maps[0], maps[1], stage.window_size, shift, implementation="triton").loss
        return loss, *torch.autograd.grad(loss, maps, upstream)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(one, other) for one, other in zip(expected.values(), found))
    return {"note": "same bits" if same else "FAILED: other bits than without a graph"}


def _check_compilations(suite: Suite, layout: str) -> Row:
    from sward.losses import MWADLoss

    if suite.rehearsal:
        return {"note": "skipped: needs a GPU"}
    import triton

    compiled: list[str] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **details: compiled.append(details["fn"].name)
    try:
        # A width that nothing else here uses.
        loss = MWADLoss([32] * 4, [32] * 4, embed_dim=48, teacher_projections="learned", implementation="triton")
        loss = loss.to(suite.device).to(memory_format=LAYOUTS[layout])
        maps = [
            [
                torch.randn(2, 32, side, 2 * side, device=suite.device).to(memory_format=LAYOUTS[layout])
                for side in (128, 64, 32, 16)
            ]
            for _ in range(2)
        ]
        for _ in range(2):
            loss(*maps).loss.backward()
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    return {"note": f"{'' if len(compiled) == 2 else 'FAILED: '}compiled {len(compiled)}: {', '.join(compiled)}"}


# ------------------------------------------------------------------------------------------------------------ timings


@contextmanager
def _fp32_products(precision: str) -> Iterator[None]:
    """Compute fp32 products in `"tf32"` or in full precision, `"ieee"`."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def ideal_bytes(stage: Stage, dtype: torch.dtype, direction: str) -> int:
    """Read queries, keys and values of both sides once; backward also writes as many gradients."""
    maps = 2 * 3 * stage.batch * stage.dim * stage.height * stage.width * dtype.itemsize
    return maps if direction == "forward" else 2 * maps


def time_windowed(suite: Suite, dtype: str, providers: tuple[str, ...], stages: tuple[Stage, ...]) -> None:
    """Forward and backward of every provider, apart."""
    with _fp32_products("tf32" if dtype == "tf32" else "ieee"):
        for layout in LAYOUTS:
            for stage in stages:
                wanted = [
                    provider
                    for provider in providers
                    if not all(
                        suite.has(case=str(stage), provider=provider, dtype=dtype, layout=layout, **{"pass": direction})
                        for direction in ("forward", "backward")
                    )
                ]
                if not wanted:
                    continue
                maps = maps_of(stage, DTYPES[dtype], layout, suite.device)
                oracle = oracle_of(stage, maps)
                for provider in wanted:
                    for direction in ("forward", "backward"):
                        suite.attempt(
                            lambda stage=stage, maps=maps, oracle=oracle, provider=provider, direction=direction: (  # type: ignore[misc]
                                _timed(suite, stage, maps, oracle, provider, direction, dtype)
                            ),
                            **{"case": str(stage), "provider": provider, "pass": direction},
                            dtype=dtype,
                            layout=layout,
                        )


def _timed(
    suite: Suite,
    stage: Stage,
    maps: list[Tensor],
    oracle: dict[str, Tensor],
    provider: str,
    direction: str,
    dtype: str,
) -> Row:
    row: Row = {}
    size = ideal_bytes(stage, maps[0].dtype, direction)
    if provider == "copy":
        source = torch.empty(size // 2, dtype=torch.int8, device=suite.device)
        target = torch.empty_like(source)
        milliseconds = suite.milliseconds(lambda: target.copy_(source))
    else:
        forward, inputs = _call(stage, maps, provider)
        outputs = forward()
        upstream = tuple(torch.full_like(each, stage.pixels) for each in outputs)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

        if provider != "sdpa":
            results = dict(zip(("loss", "student", "teacher"), (outputs[0].detach(), *backward())))
            row = _verdict(worst_error(results, oracle), dtype)
        milliseconds = suite.milliseconds(forward if direction == "forward" else backward)
    return _with_bandwidth(milliseconds, size) | row


def _with_bandwidth(milliseconds: float, size: int) -> Row:
    return {"ms": milliseconds, "GB/s": size / milliseconds / 1e6}


def _call(stage: Stage, maps: list[Tensor], provider: str) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
    """A forward pass, and the tensors that its backward pass differentiates."""
    shift = shift_on(maps[0].device)
    if provider == "sdpa":
        # Attention alone, of windows that lie one after another already.
        grid = WindowGrid(stage.height, stage.width, stage.window_size)
        sides = [
            [
                part.flatten(0, 1)[:, None].contiguous().detach().requires_grad_()
                for part in grid.partition(each.detach(), shift).chunk(3, dim=-1)
            ]
            for each in maps
        ]

        def attention() -> tuple[Tensor, ...]:
            return tuple(F.scaled_dot_product_attention(query, key, value) for query, key, value in sides)

        return attention, [part for side in sides for part in side]
    implementation = "reference" if provider == "torch.compile(reference)" else provider.split(",")[0]

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return windowed_distillation(student, teacher, stage.window_size, shift, implementation=implementation).loss

    if provider == "torch.compile(reference)":
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True)
    return lambda: (loss(maps[0], maps[1]),), maps


def time_dtype(dtype: str) -> Callable[[Suite], None]:
    def run(suite: Suite) -> None:
        headline, *others = suite.sizes.stages
        time_windowed(suite, dtype, ("triton", "copy", "sdpa", "eager", "reference"), (headline,))
        if dtype == "bf16" or not suite.rehearsal:
            time_windowed(suite, dtype, ("triton", "copy", "eager"), tuple(others))

    return run


def time_compiled(suite: Suite) -> None:
    """`torch.compile` takes many seconds per case: the headline alone, the important types first."""
    if suite.rehearsal:
        suite.attempt(lambda: {"note": "skipped: needs a GPU"}, case="torch.compile(reference)")
        return
    for dtype in ("bf16", "fp32", "tf32", "fp16"):
        time_windowed(suite, dtype, ("torch.compile(reference)",), suite.sizes.stages[:1])


def time_others(suite: Suite) -> None:
    """The prototype regularization and the relational KL."""
    for dtype in ("bf16", "fp32"):
        for layout in LAYOUTS:
            for size in suite.sizes.prototypes:
                _time_prototypes(suite, size, dtype, layout)
    images, pixels, channels = suite.sizes.relation
    generator = torch.Generator(suite.device).manual_seed(0)
    vectors = torch.randn(2, images, pixels, channels, generator=generator, device=suite.device)
    student, teacher = vectors[0].clone().requires_grad_(), vectors[1]
    map_bytes = 4 * images * pixels * channels
    for dtype in ("fp32", "tf32"):
        with _fp32_products("tf32" if dtype == "tf32" else "ieee"):
            for implementation in ("triton", "eager", "reference"):
                _time_both(
                    suite,
                    lambda implementation=implementation: relational_kl(  # type: ignore[misc]
                        student, teacher, implementation=implementation
                    ),
                    student,
                    {"forward": 2 * map_bytes, "backward": 3 * map_bytes},
                    case=f"relational_kl B={images} P={pixels} C={channels}",
                    provider=implementation,
                    dtype=dtype,
                    layout="",
                )


def _time_prototypes(suite: Suite, shape: tuple[int, int, int, int, int], dtype: str, layout: str) -> None:
    batch, channels, height, width, classes = shape
    generator = torch.Generator(suite.device).manual_seed(0)
    labels = torch.randint(classes, (batch, height, width), generator=generator, device=suite.device)
    values = torch.randn(batch, channels, height, width, generator=generator, device=suite.device)
    features = values.to(DTYPES[dtype], memory_format=LAYOUTS[layout]).requires_grad_()
    size = features.numel() * features.element_size()
    for implementation in ("triton", "eager", "reference"):
        _time_both(
            suite,
            lambda implementation=implementation: (  # type: ignore[misc]
                prototype_discrimination(features, labels, classes, implementation=implementation).loss
            ),
            features,
            {"forward": size, "backward": 2 * size},
            case=f"prototype_discrimination {'x'.join(map(str, shape[:4]))} K={classes}",
            provider=implementation,
            dtype=dtype,
            layout=layout,
        )


def _time_both(suite: Suite, loss: Callable[[], Tensor], leaf: Tensor, sizes: dict[str, int], **place: str) -> None:
    for direction, size in sizes.items():

        def run(direction: str = direction, size: int = size) -> Row:
            if direction == "forward":
                return _with_bandwidth(suite.milliseconds(loss), size)
            value = loss()
            upstream = torch.ones_like(value)
            backward = suite.milliseconds(lambda: torch.autograd.grad(value, leaf, upstream, retain_graph=True))
            return _with_bandwidth(backward, size)

        suite.attempt(run, **place, **{"pass": direction})


# ------------------------------------------------------------------------------------------------- rows of the table

ALTERNATIVES: dict[tuple[str, str], tuple[tuple[int, int, int, int], ...]] = {
    ("bf16", "channels_last"): ((64, 64, 64, 4), (64, 64, 32, 4), (64, 64, 16, 4), (64, 64, 64, 8)),
    ("bf16", "nchw"): ((64, 64, 32, 4), (64, 64, 16, 4), (64, 64, 32, 8)),
    ("fp32", "channels_last"): ((64, 64, 16, 4), (64, 64, 32, 4), (64, 64, 16, 8), (16, 16, 32, 4)),
    ("tf32", "channels_last"): ((64, 64, 16, 4), (64, 64, 32, 4), (16, 16, 32, 4)),
    ("fp32", "nchw"): ((64, 64, 16, 4), (16, 16, 32, 4)),
}
"""Tiles to try beside the table's, both passes with the same: rows, keys, channels, warps."""


def compare_tiles(suite: Suite) -> None:
    """The headline with the table's tiles and with others, whose results must agree."""
    from sward_kernels.gpu import launching
    from sward_kernels.windowed import plan
    from sward_kernels.windowed.tile_table import Tiles

    stage, chosen = suite.sizes.stages[0], plan.tiles_of
    combinations = list(ALTERNATIVES.items())
    for (dtype, layout), alternatives in combinations[:: 3 if suite.rehearsal else 1]:
        with _fp32_products("tf32" if dtype == "tf32" else "ieee"):
            maps = maps_of(stage, DTYPES[dtype], layout, suite.device)
            oracle = oracle_of(stage, maps)
            for tiles in (None, *alternatives[:1]) if suite.rehearsal else (None, *alternatives):
                try:
                    plan.tiles_of = chosen if tiles is None else lambda *_, tiles=tiles: Tiles(*tiles)
                    launching.forget_calls()
                    name = "table" if tiles is None else "{}x{}x{}, {} warps".format(*tiles)
                    for direction in ("forward", "backward"):
                        suite.attempt(
                            lambda maps=maps, oracle=oracle, direction=direction, dtype=dtype: _timed(  # type: ignore[misc]
                                suite, stage, maps, oracle, "triton", direction, dtype
                            ),
                            **{"case": str(stage), "provider": f"triton, {name}", "pass": direction},
                            dtype=dtype,
                            layout=layout,
                        )
                finally:
                    plan.tiles_of = chosen
                    launching.forget_calls()


# ------------------------------------------------------------------------------------------- the step and the counters


def time_step(suite: Suite) -> None:
    """A training step of a preset, and the share of distillation in it."""
    import training_step

    from sward import presets

    student = presets.get(suite.sizes.preset).student
    image_size, batch = suite.sizes.step or (student.dataset.image_size, student.batch)
    case = f"step of {suite.sizes.preset}, {image_size[0]}x{image_size[1]}, batch {batch}"
    if suite.has(case=case, provider="step"):
        return
    shape = training_step.Shape(suite.sizes.preset, image_size, batch)
    measured = training_step.measure(shape, "sward", suite.device, rounds=3 if not suite.rehearsal else 1)
    for name, value in measured.items():
        if isinstance(value, float):
            note = {"share": f"{value:.1%} of the student", "memory": f"{value:.0f} MiB"}.get(name)
            suite.add(case=case, provider=name, **({"note": note} if note else {"ms": value}))


METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum",
    "l1tex__t_bytes.sum",
    "smsp__inst_executed_op_local_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)


def count(suite: Suite) -> None:
    """Counters of Nsight Compute where `ncu` is installed and allowed; else the kernels' times from the profiler."""
    stage = suite.sizes.stages[0]
    for dtype in ("bf16", "fp32"):
        maps = maps_of(stage, DTYPES[dtype], "channels_last", suite.device)
        if suite.has(case=str(stage), provider="profiler", dtype=dtype):
            continue
        results_of(stage, maps, "triton")
        activities = [torch.profiler.ProfilerActivity.CPU if suite.rehearsal else torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            results_of(stage, maps, "triton")
        kernels = [
            f"{event.key[:40]} {event.device_time_total:.0f} us"
            for event in profile.key_averages()
            if event.device_time_total > 0
        ]
        note = "; ".join(kernels) or "no kernel on a device"
        suite.add(case=str(stage), provider="profiler", dtype=dtype, layout="channels_last", note=note)
    if suite.rehearsal or not shutil.which("ncu"):
        suite.attempt(lambda: {"note": "skipped: ncu is not installed"}, case="Nsight Compute")
        return
    log = suite.folder / "ncu.csv"
    script = (
        "import sys, torch; sys.path.insert(0, 'benchmarks'); import gpu_suite as g; stage = g.PAPER.stages[0]; "
        "[g.results_of(stage, g.maps_of(stage, t, 'channels_last', torch.device('cuda')), 'triton') "
        "for t in (torch.bfloat16, torch.float32)]"
    )
    command = ["ncu", "--csv", "--kernel-name", "regex:.*(forward|backward).*kernel", "--metrics", ",".join(METRICS)]

    def run() -> Row:
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.run(
                [*command, sys.executable, "-c", script], cwd=REPOSITORY, stdout=file, stderr=file, check=False
            )
        return {"note": "see ncu.csv" if status.returncode == 0 else "not permitted or failed; see ncu.csv"}

    suite.attempt(run, case="Nsight Compute")


# ----------------------------------------------------------------------------------------------------- the whole suite


class Part(NamedTuple):
    run: Callable[[Suite], None]
    seconds: int
    """The time limit. All of them together fit fifteen minutes."""


PARTS = {
    "tests": Part(run_tests, 200),
    "checks": Part(check, 70),
    "bf16": Part(time_dtype("bf16"), 80),
    "fp32": Part(time_dtype("fp32"), 75),
    "tf32": Part(time_dtype("tf32"), 60),
    "fp16": Part(time_dtype("fp16"), 45),
    "tiles": Part(compare_tiles, 80),
    "others": Part(time_others, 50),
    "step": Part(time_step, 90),
    "compiled": Part(time_compiled, 90),
    "counters": Part(count, 45),
}


def run_part(name: str, folder: Path, rehearsal: bool) -> str:
    """Run one part to its end or its limit; return how it ended."""
    if rehearsal:  # in this process: starting eleven would take longer than what they do
        PARTS[name].run(Suite(name, folder, rehearsal))
        return "done"
    process = subprocess.Popen(
        [sys.executable, __file__, "--run", name, "--out", str(folder)], start_new_session=True, cwd=REPOSITORY
    )
    try:
        code = process.wait(timeout=PARTS[name].seconds)
        return "done" if code == 0 else f"failed with status {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {PARTS[name].seconds} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # a test run has processes of its own
            process.wait()


def write_report(folder: Path, device: str, ends: dict[str, str]) -> Path:
    """Write the table of all rows of all parts."""
    lines = [
        f"# {device}",
        "",
        f"torch {torch.__version__}, {datetime.date.today().isoformat()}. Made by `python benchmarks/gpu_suite.py`, "
        "which says what the columns mean.",
        "",
        *(f"- {name}: {end}" for name, end in ends.items()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for name in PARTS:
        for row in read_rows(folder / f"{name}.jsonl"):
            cells = [_cell(column, row.get(column, "")) for column in COLUMNS]
            lines.append("| " + " | ".join(cells) + " |")
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _cell(column: str, value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.1e}" if column == "error" else f"{value:.4f}" if column == "ms" else f"{value:.1f}"
    return str(value).replace("|", "/")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--out", type=Path, help="folder of the results; default: the device's, in benchmarks/results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in the interpreter, to see that all runs")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)  # one part, in this process
    options = parser.parse_args(arguments)
    if options.rehearse:
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--rehearse needs TRITON_INTERPRET=1 before Triton is imported")
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.append(str(REPOSITORY))
        import tests.support.interpreter  # noqa: F401  (makes it fast)
    elif not torch.cuda.is_available():
        parser.error("the suite needs a GPU; --rehearse runs it without one, in Triton's interpreter")
    device = "rehearsal without a GPU" if options.rehearse else torch.cuda.get_device_name()
    folder = options.out or RESULTS / re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        PARTS[options.run].run(Suite(options.run, folder, rehearsal=False))
        return 0
    state = folder / "parts.json"
    ends: dict[str, str] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    for name in options.parts:
        if ends.get(name, "").startswith("done"):
            print(f"{name}: done before")
            continue
        began = time.perf_counter()
        print(f"{name}, at most {PARTS[name].seconds} s", flush=True)
        end = run_part(name, folder, options.rehearse)
        ends[name] = f"{end} ({time.perf_counter() - began:.0f} s)"
        state.write_text(json.dumps(ends, indent=1), encoding="utf-8")
        write_report(folder, device, ends)
    print(f"written: {write_report(folder, device, ends)}")
    rows = [row for name in PARTS for row in read_rows(folder / f"{name}.jsonl")]
    failed = any("FAILED" in str(row.get("note", "")) for row in rows)
    return 1 if failed or not all(end.startswith("done") for end in ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
