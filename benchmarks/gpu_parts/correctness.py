"""Parts `tests` and `checks`: is it right on the device?"""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor

from gpu_parts.operation import maps_of, oracle_of, results_of, shift_on, verdict
from gpu_parts.rows import LAYOUTS, REPOSITORY, Row, Suite
from harness import worst_error
from sward_kernels import windowed_distillation


def run_tests(suite: Suite) -> None:
    """All tests of the Triton kernels, on the device."""
    paths = [f"tests/kernels/{name}" for name in ("windowed", "windowed_features", "prototypes", "relation")]
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


def _check_paper_size(suite: Suite, layout: str) -> Row:
    stage = suite.sizes.stages[0]
    maps = maps_of(stage, torch.float32, layout, suite.device)
    return verdict(worst_error(results_of(stage, maps, "triton"), oracle_of(stage, maps)), "fp32")


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
    return verdict(worst_error(found, {name: each.float() for name, each in zip(names, expected)}), "bf16")


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
    stream.wait_stream(torch.cuda.current_stream())  # which still fills the maps and the shift
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
