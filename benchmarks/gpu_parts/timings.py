"""The parts that time: windowed distillation per precision, the other operations, tiles, a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.operation import fp32_products, maps_of, oracle_of, shift_on, verdict
from gpu_parts.rows import DTYPES, LAYOUTS, Row, Stage, Suite
from harness import worst_error
from sward_kernels import prototype_discrimination, relational_kl, windowed_distillation, windowed_feature_distillation
from sward_kernels.windows import WindowGrid


def ideal_bytes(stage: Stage, dtype: torch.dtype, direction: str) -> int:
    """Read queries, keys and values of both sides once; backward also writes as many gradients."""
    maps = 2 * 3 * stage.batch * stage.dim * stage.height * stage.width * dtype.itemsize
    return maps if direction == "forward" else 2 * maps


def time_windowed(suite: Suite, dtype: str, providers: tuple[str, ...], stages: tuple[Stage, ...]) -> None:
    """Forward and backward of every provider, apart."""
    with fp32_products("tf32" if dtype == "tf32" else "ieee"):
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
            row = verdict(worst_error(results, oracle), dtype)
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
    """Windowed distillation from features, the prototype regularization and the relational KL."""
    for dtype in ("bf16", "fp16"):
        for layout in LAYOUTS:
            for stage, channels in suite.sizes.features:
                _time_features(suite, stage, channels, dtype, layout)
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
        with fp32_products("tf32" if dtype == "tf32" else "ieee"):
            for implementation in ("triton", "eager", "reference"):
                _time_both(
                    suite,
                    lambda implementation=implementation: relational_kl(  # type: ignore[misc]
                        student, teacher, implementation=implementation
                    ),
                    (student,),
                    {"forward": 2 * map_bytes, "backward": 3 * map_bytes},
                    case=f"relational_kl B={images} P={pixels} C={channels}",
                    provider=implementation,
                    dtype=dtype,
                    layout="",
                )


def _time_features(suite: Suite, stage: Stage, channels: int, dtype: str, layout: str) -> None:
    """Projections inside the kernels, and 1x1 convolutions before them; the teacher is frozen, as in MWADLoss."""
    generator = torch.Generator(suite.device).manual_seed(0)
    maps = torch.randn(2, stage.batch, channels, stage.height, stage.width, generator=generator, device=suite.device)
    student, teacher = (each.to(DTYPES[dtype], memory_format=LAYOUTS[layout]) for each in maps)
    weights = torch.randn(2, 3 * stage.dim, channels, generator=generator, device=suite.device) / channels**0.5
    weight_student, weight_teacher = weights.to(DTYPES[dtype])
    inputs = (student.requires_grad_(), weight_student.requires_grad_())
    shift = shift_on(suite.device)

    def inside() -> Tensor:
        return windowed_feature_distillation(
            student, teacher, weight_student, weight_teacher, stage.window_size, shift, implementation="triton"
        ).loss

    def before() -> Tensor:
        qkv_student = F.conv2d(student, weight_student[:, :, None, None])
        qkv_teacher = F.conv2d(teacher, weight_teacher[:, :, None, None])
        return windowed_distillation(qkv_student, qkv_teacher, stage.window_size, shift, implementation="triton").loss

    size = student.numel() * student.element_size()
    for provider, loss in (("triton", inside), ("convolutions, triton", before)):
        _time_both(
            suite,
            loss,
            inputs,
            {"forward": 2 * size, "backward": 3 * size},
            case=f"windowed_feature_distillation C={channels} {stage}",
            provider=provider,
            dtype=dtype,
            layout=layout,
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
            (features,),
            {"forward": size, "backward": 2 * size},
            case=f"prototype_discrimination {'x'.join(map(str, shape[:4]))} K={classes}",
            provider=implementation,
            dtype=dtype,
            layout=layout,
        )


def _time_both(
    suite: Suite, loss: Callable[[], Tensor], inputs: tuple[Tensor, ...], sizes: dict[str, int], **place: str
) -> None:
    for direction, size in sizes.items():

        def run(direction: str = direction, size: int = size) -> Row:
            if direction == "forward":
                return _with_bandwidth(suite.milliseconds(loss), size)
            value = loss()
            upstream = torch.ones_like(value)
            backward = suite.milliseconds(lambda: torch.autograd.grad(value, inputs, upstream, retain_graph=True))
            return _with_bandwidth(backward, size)

        suite.attempt(run, **place, **{"pass": direction})


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
        with fp32_products("tf32" if dtype == "tf32" else "ieee"):
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
